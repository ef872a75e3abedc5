"""The training reward and a held-out one parting: when it is said, and what."""

import pytest
import torch

from diffalign.data import Prompt
from diffalign.engine.checkpoint import save_checkpoint
from diffalign.engine.evaluate import Evaluation
from diffalign.engine.parting import Parting

PROMPTS = [Prompt(f"prompt {i}", i) for i in range(16)]
# Sixteen differences of mean 0 and standard deviation 1 (n - 1): their mean has a standard error of exactly 1/4.
SPREAD = torch.tensor([1.0, -1.0]).repeat(8) * (15 / 16) ** 0.5
BASE = torch.linspace(0, 1, 16)


def validation(proxy, heldout, **more):
    values = {"proxy": proxy + torch.zeros(16), "heldout": heldout + torch.zeros(16)} | more
    return Evaluation(PROMPTS, torch.zeros(16, 3, 1, 1, dtype=torch.uint8), values)


@pytest.fixture
def told(tmp_path):
    watch = Parting()
    return lambda step, *scores, **more: watch.look(step, validation(*scores, **more), "proxy", tmp_path)


@pytest.mark.parametrize(("standard_errors", "parted"), [(-3.0, True), (-1.0, False), (3.0, False)])
def test_it_has_parted_where_the_fall_is_more_than_noise(told, standard_errors, parted):
    assert told(0, 0.5, BASE) == []
    assert bool(told(10, 0.6, BASE + SPREAD + standard_errors / 4)) is parted


def test_a_fall_of_both_is_no_parting(told):
    told(0, 0.5, 1.0)
    assert told(10, 0.4, 0.5) == []


def test_the_sentence_names_rewards_values_step_and_checkpoint(told, tmp_path):
    told(0, 0.5, 1.0)
    told(10, 0.625, 1.25)  # the best
    told(20, 0.75, 1.125)
    save_checkpoint(tmp_path, 10, {"x": 1})
    (sentence,) = told(30, 0.875, 1.0)
    assert "step 30: the training reward proxy has risen from 0.625 to 0.875" in sentence
    assert "heldout has fallen from its best, 1.25 at step 10, to 1 (paired 95 % interval -0.25 to -0.25)" in sentence
    assert f"The checkpoint of step 10 is {tmp_path / 'step-000010'}" in sentence
    (tmp_path / "step-000010" / "manifest.json").unlink()
    assert "There is no checkpoint of step 10" in told(40, 0.875, 1.0)[0]


def test_the_oracle_is_never_asked_and_failed_scores_are_left_out(told):
    gap = BASE.clone()
    gap[0] = torch.nan
    silent = torch.full((16,), torch.nan)
    told(0, 0.5, gap, **{"shapes-oracle": torch.ones(16), "silent": silent})
    (sentence,) = told(10, 0.6, BASE - 0.5, **{"shapes-oracle": torch.zeros(16), "silent": silent})
    assert "held-out reward heldout" in sentence


def test_a_resumed_run_says_the_same(told, tmp_path):
    first, second = Parting(), Parting()
    first.look(10, validation(0.5, BASE), "proxy", tmp_path)
    second.load_state_dict(first.state_dict())
    later = [watch.look(20, validation(0.6, BASE - 0.5), "proxy", tmp_path) for watch in (first, second)]
    assert later[0]
    assert later[0] == later[1]
