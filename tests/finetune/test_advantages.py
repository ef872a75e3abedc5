"""Advantages against their formulas, written out for a few numbers, and what failed scores do to them."""

import math

import numpy as np
import pytest
import torch

from diffalign.finetune.advantages import ADVANTAGES, PromptHistory

REWARDS = torch.tensor([[1.0, 2.0, 4.0, 4.0], [0.5, 0.5, 0.5, 0.5], [7.0, math.nan, 3.0, 5.0]], dtype=torch.float64)
NAN = math.nan


def expected(kind):
    rows = [np.array([1.0, 2, 4, 4]), np.full(4, 0.5), np.array([7.0, 3, 5])]
    every = np.concatenate(rows)
    if kind == "group":
        found = [(r - r.mean()) / (r.std() or 1) for r in rows]
    elif kind == "group_mean":
        found = [r - r.mean() for r in rows]
    elif kind == "rloo":
        found = [np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]) for r in rows]
    elif kind == "rank":
        found = [np.array([-1, -1 / 3, 2 / 3, 2 / 3]), np.zeros(4), np.array([1.0, -1, 0])]
    elif kind == "global_std":
        found = [(r - r.mean()) / every.std() for r in rows]
    else:
        found = [(r - every.mean()) / every.std() for r in rows]
    return torch.from_numpy(np.stack([found[0], found[1], np.insert(found[2], 1, NAN)]))


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_the_formulas(kind):
    torch.testing.assert_close(ADVANTAGES[kind](REWARDS), expected(kind), equal_nan=True)


@pytest.mark.parametrize("kind", ["group", "global_std", "batch"])
def test_rounding_is_no_spread(kind):
    """Rewards that differ by rounding alone say nothing; divided by their spread they would say everything."""
    rewards = 0.1 + 1e-9 * torch.tensor([[1.0, -1.0], [2.0, 0.0]], dtype=torch.float64)
    assert ADVANTAGES[kind](rewards).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_a_lone_sample_or_none_says_nothing(kind):
    assert not ADVANTAGES[kind](torch.tensor([[3.0]])).nan_to_num(0).any()
    assert ADVANTAGES[kind](torch.full((2, 3), NAN)).isnan().all()


def test_history_of_a_prompt():
    """Below `least` the step's statistics, from then on the prompt's last `size` rewards."""
    history = PromptHistory(size=4, least=3)
    first = torch.tensor([[1.0, 3.0], [10.0, 14.0]], dtype=torch.float64)
    step = (first - first.mean()) / first.std(unbiased=False)
    torch.testing.assert_close(history(first, ["a", "b"]), step)
    second = torch.tensor([[5.0, NAN]], dtype=torch.float64)
    past = np.array([1.0, 3.0, 5.0])
    torch.testing.assert_close(history(second, ["a"])[0, 0], torch.tensor((5 - past.mean()) / past.std()))
    history(torch.tensor([[6.0, 7.0]]), ["a"])
    assert history.rewards == {"a": [3.0, 5.0, 6.0, 7.0], "b": [10.0, 14.0]}
