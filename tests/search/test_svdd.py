"""SVDD and CoDe on problems whose targets are known."""

import math

import numpy as np
import pytest
import torch

from diffalign.laws import DDIM
from diffalign.search.best_of_n import BestOfN, Importance
from diffalign.search.budget import Budget
from diffalign.search.svdd import SVDD
from tests.search.discrete import Enumerable
from tests.search.problems import Ring

STEPS = 6


def children_nfe(children, steps):
    """Evaluations of one sample: its first state, and every child at the steps between."""
    return 1 + children * (steps - 1)


@pytest.mark.parametrize(("block", "seeds"), [(1, 150), (3, 150)])
def test_z_is_unbiased(block, seeds):
    space = Enumerable(seeds=range(seeds))
    search = SVDD(num_children=3, block=block)
    z = np.exp([found.log_z - space.log_z for found in search.run(space, Budget(nfe=12 * children_nfe(3, STEPS)))])
    error = z.std() / math.sqrt(len(z))
    assert error < 0.15
    assert abs(z.mean() - 1) < 3.5 * error


def test_more_samples_come_nearer_to_the_target():
    space, search = Enumerable(seeds=range(8)), SVDD(num_children=4)
    few, many = (
        np.mean([space.total_variation(each.results, each.log_weights) for each in search.run(space, Budget(nfe=nfe))])
        for nfe in (200, 2000)
    )
    assert many < 0.6 * few
    assert many < 0.3


@pytest.mark.parametrize("block", [1, 4])
def test_lambda_of_zero_gives_the_prior(block):
    space = Ring(seeds=range(10), steps=STEPS)
    search = SVDD(target_lambda=0.0, num_children=2, block=block)
    found = search.run(space, Budget(nfe=100 * children_nfe(2, STEPS)))
    assert all(not each.log_weights.any() and each.log_z == 0 for each in found)
    modes = torch.cat([space.mode(each.results[::2, 0]) for each in found])
    counts = torch.bincount(modes, minlength=8).double()
    assert float((counts - 125).square().sum() / 125) < 24.3  # chi-square of 7 degrees of freedom at 1e-3


def test_the_child_that_goes_on_is_not_evaluated_again():
    space = Ring(seeds=range(2), steps=STEPS)
    found = SVDD(num_children=5, wave=2).run(space, Budget(nfe=3 * children_nfe(5, STEPS) + 1))
    for each in found:
        assert each.ledger.denoiser_evaluations == 3 * children_nfe(5, STEPS)
        assert len(each) == 15
        # Steps 1 to 4; before the last, which is without noise, children would stay equal.
        assert each.ledger.reward_calls == 3 * 5 * (1 + 4)
        assert each.ancestors.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert len(each.results.flatten(1).unique(dim=0)) == 15


def test_the_highest_child_goes_on():
    """With one sample and blocks of two steps, by hand."""
    space = Ring(steps=STEPS)
    found = SVDD(num_children=3, block=2, choice="highest").run(space, Budget(nfe=children_nfe(3, STEPS)))[0]
    prompts, paths = torch.zeros(3, dtype=torch.long), [(0, 0), (0, 1), (0, 2)]
    rows = space.initial(prompts, [(0,)] * 3)
    for step in range(STEPS):
        rows = space.advance(rows, space.evaluate(rows), paths)
        if step in (1, 3):
            guesses = space.guesses(rows, space.evaluate(rows), paths, 1)[0]
            rows = rows[[int(space.reward(guesses).argmax())] * 3]
    assert torch.allclose(found.results, rows.x, rtol=0, atol=1e-12)
    assert found.log_weights is None
    assert found.log_z is None


def test_it_searches_better_than_best_of_n_where_the_guess_tells():
    """The rare-event product ring, at equal evaluations."""
    best = {}
    for search in (BestOfN(), SVDD(num_children=4, choice="highest"), SVDD(num_children=4, block=5, choice="highest")):
        space = Ring(planes=4, seeds=range(10), steps=20)
        best[search.config.name, getattr(search.config, "block", 0)] = np.mean(
            [found.reward for found in search.run(space, Budget(nfe=1600))]
        )
    assert min(best["svdd", 1], best["svdd", 5]) > best["best_of_n", 0] + 2


@pytest.mark.parametrize(
    "search", [SVDD(num_children=3), SVDD(num_children=3, block=2, choice="highest")], ids=["svdd", "code"]
)
def test_micro_batches_waves_and_neighbours_change_nothing(search):
    budget = Budget(nfe=8 * children_nfe(3, STEPS))
    found = [search.run(Ring(seeds=[1], steps=STEPS, micro_batch_size=size), budget)[0] for size in (1, 7, 64)]
    found.append(search.run(Ring(seeds=[4, 1], steps=STEPS), budget)[1])
    found.append(SVDD(**{**search.config.model_dump(), "wave": 3}).run(Ring(seeds=[1], steps=STEPS), budget)[0])
    assert all(torch.equal(found[0].results, each.results) for each in found)


class FailingGuesses(Enumerable):
    """No score for half of the guesses, by their first token; results that chains ended in have theirs."""

    def score_guesses(self, guesses, prompts):
        return super().score_guesses(guesses, prompts).masked_fill(guesses[:, 0] < 2, math.nan)


def test_children_whose_guess_fails_leave_the_target_as_it_is():
    space = FailingGuesses(seeds=range(150))
    budget = Budget(nfe=12 * children_nfe(3, STEPS))
    z = np.exp([found.log_z - space.log_z for found in SVDD(num_children=3, guess_draws=1).run(space, budget)])
    assert abs(z.mean() - 1) < 3.5 * z.std() / math.sqrt(len(z))


def test_a_child_whose_guess_failed_is_never_the_highest():
    search, prompts = SVDD(choice="highest"), torch.zeros(2, dtype=torch.long)
    values = torch.tensor([[math.nan, -3.0, -2.0], [math.nan] * 3])
    assert search._choose(Ring(), values, prompts, [0, 1], 1)[0].tolist() == [2, 0]


def test_results_that_fail_leave_and_are_counted():
    class Failing(Ring):
        def rate(self, results, prompts):
            values = self.reward(results).masked_fill(results[:, 0, 0] > 3, math.nan)
            self.count_scores(values, prompts)
            return values

    (found,) = SVDD(num_children=4).run(Failing(steps=STEPS), Budget(nfe=40 * children_nfe(4, STEPS)))
    assert 0 < len(found) < 160
    assert (found.results[:, 0, 0] <= 3).all()
    assert found.log_weights.isfinite().all()
    assert len(found.log_weights) == len(found.ancestors) == len(found)


def test_chains_whose_children_are_equal_are_refused():
    still = Ring(steps=STEPS, law=DDIM(0.0))
    with pytest.raises(ValueError, match="no step from 0 to 6 is random"):
        SVDD().run(still, Budget(nfe=1000))
    assert still.ledgers[0].denoiser_evaluations == 0
    with pytest.raises(ValueError, match="target_lambda = 0"):
        SVDD(choice="highest", target_lambda=0.0)
    with pytest.raises(ValueError, match=f"takes {children_nfe(20, STEPS)} denoiser evaluations"):
        SVDD().run(Ring(steps=STEPS), Budget(nfe=100))


def test_one_choice_at_the_end_alone_is_importance_resampling_of_siblings():
    """A block as long as the chain: M samples of one first state, each with weight exp(lambda r) / M."""
    (found,) = SVDD(num_children=4, block=STEPS).run(Ring(steps=STEPS), Budget(nfe=5 * children_nfe(4, STEPS)))
    (plain,) = Importance().run(Ring(steps=STEPS), Budget(nfe=20 * STEPS))
    assert torch.equal(found.log_weights, found.rewards)
    assert len(found) == len(plain) == 20
    assert found.ledger.reward_calls == 20
