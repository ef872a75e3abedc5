"""Pareto ranks against a sorting that was written straight from the definition, pair by pair."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffalign.rewards.pareto import ParetoRank, crowding_distance, fronts
from tests.rewards.channels import channel, fails_on, pixels, prompts

NAN = math.nan


def brute_fronts(points):
    """Peels off, one by one, the points that no other one left dominates."""

    def dominates(p, q):
        return all(a >= b for a, b in zip(p, q, strict=True)) and any(a > b for a, b in zip(p, q, strict=True))

    left, found, number = set(range(len(points))), {}, 0
    while left:
        best = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        found |= dict.fromkeys(best, number)
        left -= best
        number += 1
    return [found[i] for i in range(len(points))]


def paper_crowding(points, members):
    """The procedure of Deb et al. (2002), on one front."""
    distance = dict.fromkeys(members, 0.0)
    for k in range(len(points[0])):
        order = sorted(members, key=lambda i: points[i][k])
        low, high = points[order[0]][k], points[order[-1]][k]
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (points[after][k] - points[before][k]) / (high - low)
    return distance


@pytest.mark.parametrize(("rewards", "count"), [(1, 9), (2, 25), (3, 40), (4, 6)])
@pytest.mark.parametrize("levels", [None, 4])
def test_fronts_are_those_of_the_definition(rewards, count, levels):
    values = torch.rand(rewards, count, generator=torch.Generator().manual_seed(rewards), dtype=torch.float64)
    if levels:
        values = (values * levels).floor()  # ties and duplicates
    assert fronts(values).tolist() == brute_fronts(values.T.tolist())


@pytest.mark.parametrize(("rewards", "count"), [(2, 25), (3, 40)])
def test_crowding_is_that_of_the_paper_where_no_scores_are_equal(rewards, count):
    values = torch.rand(rewards, count, generator=torch.Generator().manual_seed(rewards), dtype=torch.float64)
    points, front = values.T.tolist(), fronts(values).tolist()
    expected = {}
    for number in set(front):
        members = [i for i in range(count) if front[i] == number]
        expected |= paper_crowding(points, members) if len(members) > 1 else {}
    found = crowding_distance(values, fronts(values))
    for i, distance in expected.items():
        assert found[i].item() == pytest.approx(distance, rel=1e-12)
    assert sum(math.isfinite(d) for d in expected.values()) > 3


def rank(table, texts=None):
    """ParetoRank of channels that hold the given scores (N, K <= 3), NaN for a failed one."""
    table = torch.tensor(table, dtype=torch.float64)
    count, rewards = table.shape
    x = torch.zeros(count, 3, 1, 1, dtype=torch.float64)
    x[:, :rewards, 0, 0] = table.nan_to_num()
    bad = table.isnan().any(1).tolist()
    texts = texts or ["p"] * count
    members = [channel(k) for k in range(1, rewards)]
    first = channel(0) if not any(bad) else fails_on(0, texts[bad.index(True)])
    return ParetoRank([first, *members])(x, texts)


def test_one_reward_gives_its_rank():
    value = rank([[0.1], [0.9], [0.5], [0.5], [0.3]]).value
    assert value.tolist() == [0.0, 1.0, 0.625, 0.625, 0.25]  # shares of the other four beaten, a tie counting half


def test_dominated_samples_are_below_and_extremes_above_the_middle():
    value = rank([[0.0, 1.0], [0.4, 0.6], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [0.3, 0.2]]).value
    # the two ends of the front tie; between them every gap is 0.5 + 0.5, and the last sample is dominated
    assert value.tolist() == pytest.approx([0.9, 0.4, 0.4, 0.4, 0.9, 0.0])
    apart = rank([[0.0, 1.0], [0.1, 0.9], [0.6, 0.4], [1.0, 0.0]]).value
    # gaps of 0.6 + 0.6 and of 0.9 + 0.9: the emptier surroundings are better
    assert apart.tolist() == pytest.approx([2.5 / 3, 0.0, 1 / 3, 2.5 / 3])


def test_the_mean_of_a_group_is_a_half_and_order_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    values = (torch.rand(20, 3, generator=generator, dtype=torch.float64) * 5).floor() / 5
    order = torch.randperm(20, generator=generator)
    first, second = rank(values.tolist()).value, rank(values[order].tolist()).value
    assert first.mean().item() == pytest.approx(0.5)
    assert torch.equal(first[order], second)
    assert first.min() >= 0
    assert first.max() <= 1


def test_scales_do_not_matter():
    x = pixels(12)
    plain = ParetoRank([channel(0), channel(1)])(x, ["p"] * 12).value
    scaled = ParetoRank([channel(0, scale=64.0, shift=-3.0), channel(1, scale=0.25)])(x, ["p"] * 12).value
    torch.testing.assert_close(plain, scaled)


def test_groups_are_prompts_wherever_they_stand():
    x = pixels(12)
    texts = ["a", "b", "c"] * 4
    reward = ParetoRank([channel(0), channel(1), channel(2)])
    assert reward.groupwise
    assert "prompt" in reward.needs
    whole = reward(x, texts).value
    for text in "abc":
        rows = [i for i, name in enumerate(texts) if name == text]
        assert torch.equal(whole[rows], reward(x[rows], [text] * 4).value)
    assert reward(x, prompts(12)).value.tolist() == [0.5] * 12  # alone in its group


def test_a_failed_sample_leaves_its_group():
    table = [[0.2, 0.3], [NAN, 0.9], [0.4, 0.5], [0.6, 0.1]]
    score = rank(table, ["p", "bad", "p", "p"])
    kept = rank([row for row in table if not math.isnan(row[0])])
    assert score.valid.tolist() == [True, False, True, True]
    assert torch.equal(score.value[[0, 2, 3]], kept.value)


def test_there_is_no_gradient():
    reward = ParetoRank([channel(0), channel(1)])
    assert not reward.differentiable
    assert not reward(pixels(3).requires_grad_(), ["p"] * 3).value.requires_grad
    assert not (reward + channel(2)).differentiable


def test_every_small_table_has_the_fronts_of_the_definition_and_equal_samples_are_equal():
    """All 2^8 tables of four samples and two rewards with two levels."""
    for numbers in itertools.product((0.0, 1.0), repeat=8):
        points = np.reshape(numbers, (4, 2))
        front = brute_fronts(points.tolist())
        values = torch.tensor(points.T.copy())
        assert fronts(values).tolist() == front
        crowding = crowding_distance(values, fronts(values))
        for i, j in itertools.combinations(range(4), 2):
            if (points[i] == points[j]).all():
                assert crowding[i] == crowding[j]
