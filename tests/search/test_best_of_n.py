"""Best-of-N, importance resampling and rejection on the ring, where the target is known."""

import math

import numpy as np
import pytest
import torch

from diffalign.search import search_class
from diffalign.search.base import SEARCHES
from diffalign.search.best_of_n import BestOfN, Importance, rejected
from diffalign.search.budget import Budget
from diffalign.search.config import METHODS
from diffalign.search.weights import effective_size, log_mean_exp, systematic
from tests.search.problems import Ring

STEPS = 20


@pytest.fixture(scope="module")
def pools():
    """Twenty seeds of 500 samples, side by side."""
    return Importance().run(Ring(seeds=range(20), steps=STEPS), Budget(nfe=500 * STEPS))


def test_the_methods_of_recipes_are_the_registered_ones():
    assert all(search_class(name).config_class is config for name, config in METHODS.items())
    assert set(METHODS) == set(SEARCHES.names())


def test_importance_resampling_tends_to_the_target(pools):
    """The card's figures at 100 samples: TV .031 to .072, E r -.42 to -.46; the floor of TV at n = 2000 is .008."""
    ring = Ring()
    variations = [ring.total_variation(found.results[found.draw(2000)]) for found in pools]
    bias = np.array([found.log_z - ring.log_z for found in pools])
    assert np.mean(variations) < 0.04
    assert abs(bias.mean()) < 3 * bias.std() / math.sqrt(len(bias)) + bias.var() / 2  # Jensen: log of an unbiased mean


def test_lambda_of_zero_gives_the_prior(pools):
    found = Importance(target_lambda=0.0).run(Ring(seeds=[0], steps=STEPS), Budget(nfe=100 * STEPS))[0]
    assert torch.equal(found.log_weights, torch.zeros(100, dtype=torch.float64))
    assert found.log_z == 0
    assert torch.equal(found.rewards, pools[0].rewards[:100])  # the same samples, in whatever batch


def test_the_budget_is_spent_and_not_exceeded():
    ring = Ring(seeds=range(2), steps=STEPS)
    found = BestOfN(wave=3).run(ring, Budget(nfe=8 * STEPS - 1, reward_calls=100))
    assert [len(each) for each in found] == [7, 7]
    assert [ledger.denoiser_evaluations for ledger in ring.ledgers] == [7 * STEPS] * 2
    assert found[0].nfe.tolist() == [3 * STEPS] * 3 + [6 * STEPS] * 3 + [7 * STEPS]
    assert torch.equal(found[0].curve(), torch.tensor(np.maximum.accumulate(found[0].rewards.numpy())))
    with pytest.raises(ValueError, match="pays for no whole chain, which takes 20"):
        BestOfN().run(ring, Budget(nfe=STEPS - 1))
    assert len(BestOfN(wave=2).run(ring, Budget(seconds=1e-9))[0]) == 0


@pytest.mark.parametrize("limits", [{}, {"nfe": 0}, {"nfe": 10, "seconds": -1.0}])
def test_a_search_needs_a_budget(limits):
    with pytest.raises(ValueError, match=r"budget|nothing to search with"):
        Budget(**limits)


def test_failed_scores_leave_and_are_counted():
    class Failing(Ring):
        def rate(self, results, prompts):
            values = self.reward(results).masked_fill(results[:, 0, 0] > 0, math.nan)
            self.count_scores(values, prompts)
            return values

    found = Importance().run(Failing(steps=STEPS), Budget(nfe=100 * STEPS))[0]
    assert 0 < len(found) < 100
    assert len(found) + found.ledger.reward_failures == 100 == found.ledger.reward_calls
    assert (found.results[:, 0, 0] <= 0).all()
    assert found.log_weights.isfinite().all()


def test_micro_batches_change_nothing():
    found = [
        BestOfN(wave=40).run(Ring(seeds=[1], steps=STEPS, micro_batch_size=size), Budget(nfe=100 * STEPS))[0]
        for size in (1, 7, 64)
    ]
    assert all(torch.equal(found[0].results, each.results) for each in found)


def test_rejection_keeps_exact_draws(pools):
    """exp(r) is a probability on the ring, so 0 bounds r; accepted ones are few and follow the target."""
    ring = Ring()
    kept = torch.cat([found.results[rejected(found, 1.0, 0.0, seed)] for seed, found in enumerate(pools)])
    rate = len(kept) / sum(map(len, pools))
    assert abs(math.log(rate) - ring.log_z) < 3 / math.sqrt(len(kept))
    assert ring.total_variation(kept) < 0.04
    with pytest.raises(ValueError, match=r"above its bound -1"):
        rejected(pools[0], 1.0, -1.0)


def test_systematic_draws_are_floor_or_ceil_of_their_share_and_unbiased():
    log_weights = torch.tensor([0.1, 0.5, 0.0, 0.25, 0.15], dtype=torch.float64).log()
    counts = torch.stack(
        [torch.bincount(systematic(log_weights, 7, u), minlength=5) for u in np.linspace(0, 0.999, 997)]
    )
    share = 7 * log_weights.exp()
    assert ((counts >= share.floor()) & (counts <= share.ceil())).all()
    assert torch.allclose(counts.double().mean(0), share, atol=0.01)
    assert systematic(torch.full((3,), -math.inf), 3, 0.5).tolist() == [0, 1, 2]  # no weight at all: each once


def test_weights_far_below_one_are_no_less():
    weights = torch.tensor([-1e5, -1e5 + 1.0], dtype=torch.float64)
    assert log_mean_exp(weights) == pytest.approx(-1e5 + math.log((1 + math.e) / 2))
    assert effective_size(weights) == pytest.approx((1 + math.e) ** 2 / (1 + math.e**2))
