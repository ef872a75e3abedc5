"""Particle Gibbs on problems whose targets are known."""

import math

import numpy as np
import pytest
import torch

from diffalign.laws import DDIM
from diffalign.search.best_of_n import BestOfN
from diffalign.search.budget import Budget
from diffalign.search.gibbs import Gibbs, Trail
from diffalign.search.pool import Pool
from diffalign.search.space import Rows
from tests.search.discrete import STATES, Enumerable, index
from tests.search.problems import Ring

STEPS = 6


def exact_paths(space, prompts):
    """(steps + 1, P, L) whole chains of the target, drawn by the exact values: p(x' | x) exp(V(x') - V(x))."""
    drawn = torch.Generator().manual_seed(0)
    value = space.table.exp()
    values = [value]
    for matrix in reversed(space.steps):
        values.insert(0, matrix @ values[0])
    states = [torch.full((prompts,), len(STATES) - 1)]  # all masked
    for step, matrix in enumerate(space.steps):
        tilted = matrix[states[-1]] * values[step + 1]
        states.append(torch.multinomial(tilted, 1, generator=drawn)[:, 0])
    return STATES[torch.stack(states)]


@pytest.mark.parametrize(("threshold", "size"), [(1.0, 3), (0.5, 4)])
def test_a_sweep_leaves_the_target_invariant(threshold, size):
    """From 1,500 exact chains, after two sweeps the kept results still follow the target: a chi-square."""
    prompts = 1500
    space = Enumerable(seeds=range(prompts))
    search = Gibbs(num_particles=size, ess_threshold=threshold, resample_levels=[0.3, 0.6], guess_draws=1)
    levels = [2, 4]
    space.start()
    pool, kept = Pool(space), kept_from(space, exact_paths(space, prompts), levels, search)
    started = kept.states[-1].clone()
    for number in (1, 2):
        trail, log_weights = search._sweep(space, size, kept, number, levels)
        search._score(space, pool, trail, kept)
        kept = trail.back(search._draw(space, log_weights + trail.rewards.reshape(prompts, size), number))
    assert (kept.states[-1] != started).any(1).double().mean() > 0.15  # they moved
    expected = prompts * space.target
    counts = torch.bincount(index(kept.states[-1]), minlength=len(STATES))
    often = expected > 5
    rest = (counts[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum()
    square = float(((counts - expected)[often].square() / expected[often]).sum() + rest)
    freedom = int(often.sum())
    assert square < freedom + 3.5 * math.sqrt(2 * freedom)


def kept_from(space, paths, levels, search):
    """A trail of one given path for each prompt."""
    kept, prompts = Trail(), torch.arange(space.num_prompts)
    for step, x in enumerate(paths):
        rows = Rows(x, torch.full_like(prompts, step), prompts)
        kept.states.append(x)
        if step < space.num_steps:
            kept.outputs.append(space.predict(rows))
            where = [(0, 0)] * len(prompts)
            kept.values.append(search._compare(space, rows, kept.outputs[-1], where) if step in levels else None)
    kept.rewards, kept.leaves = space.table[index(paths[-1])], torch.full_like(prompts, -1)
    return kept


def test_more_sweeps_come_nearer_to_the_target():
    space, search = Enumerable(seeds=range(5)), Gibbs(num_particles=8)
    few, many = (
        np.mean([space.total_variation(each.results, each.log_weights) for each in search.run(space, Budget(nfe=nfe))])
        for nfe in (300, 2000)
    )
    assert many < 0.65 * few
    assert many < 0.3


def test_log_z_tends_to_the_truth():
    space = Enumerable(seeds=range(8))
    found = Gibbs(num_particles=32).run(space, Budget(nfe=3000))
    bias = np.array([each.log_z - space.log_z for each in found])
    assert abs(bias.mean()) < 0.15


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_lambda_of_zero_gives_the_prior(threshold):
    """Nothing is ever copied, so results are plain samples; a kept one counts again in the sweep after."""
    space = Ring(seeds=range(2), steps=STEPS)
    search = Gibbs(target_lambda=0.0, num_particles=5, ess_threshold=threshold, burn_in=0)
    for found in search.run(space, Budget(nfe=(5 + 3 * 4) * STEPS)):
        assert len(found) == 17
        assert found.log_z == 0
        counts = (4 * 5 * found.log_weights.exp()).round(decimals=9)
        assert counts.sum() == 20
        assert counts.min() == 1
    first = BestOfN().run(space, Budget(nfe=STEPS))[0].results
    rows = space.initial(torch.tensor([0]), [(0, 0)])
    while int(rows.steps[0]) < STEPS:
        rows = space.advance(rows, space.predict(rows), [(0, 0)])
    again = search.run(space, Budget(nfe=5 * STEPS))[0].results[:1]
    assert torch.equal(again, rows.x)
    assert not torch.equal(again, first)


def test_the_kept_path_is_one_of_the_chain_and_costs_nothing_again():
    """Its states follow one another by the chain's own steps, and a sweep evaluates the others alone."""
    space = Ring(seeds=range(3), steps=STEPS)
    search, levels = Gibbs(num_particles=4, ess_threshold=1.0), [1, 2, 3, 4]
    pool, kept = Pool(space), None
    for number in range(3):
        before = space.ledgers[0].denoiser_evaluations
        trail, log_weights = search._sweep(space, 4, kept, number, levels)
        assert space.ledgers[0].denoiser_evaluations - before == STEPS * (4 if kept is None else 3)
        if kept is not None:
            assert all(torch.equal(a[::4], b) for a, b in zip(trail.states, kept.states, strict=True))
        search._score(space, pool, trail, kept)
        kept = trail.back(search._draw(space, log_weights + trail.rewards.reshape(3, 4), number))
    rows = space.initial(torch.arange(3), [(0, 0)] * 3)
    for step in range(STEPS):
        rows.x, rows.steps = kept.states[step], torch.full((3,), step)
        assert torch.allclose(space.evaluate(rows), kept.outputs[step], rtol=0, atol=1e-12)
        law = space.transition(rows, kept.outputs[step])
        moved = (kept.states[step + 1] - law.mean).flatten(1).norm(dim=1)
        assert (moved < 6 * law.std + 1e-9).all()


def test_burn_in_is_left_out_of_the_weights():
    space = Ring(steps=STEPS)
    (found,) = Gibbs(num_particles=6, burn_in=2).run(space, Budget(nfe=(6 + 3 * 5) * STEPS))
    assert len(found) == 21
    kept = found.log_weights[:11] > -math.inf
    assert kept.sum() <= 1  # the kept path alone counts on
    assert found.log_weights.exp().sum() == pytest.approx(1)
    (early,) = Gibbs(num_particles=6, burn_in=2).run(space, Budget(nfe=6 * STEPS))
    assert early.log_weights.exp().sum() == pytest.approx(1)


def test_micro_batches_and_neighbours_change_nothing():
    search, budget = Gibbs(num_particles=5, ess_threshold=1.0), Budget(nfe=20 * STEPS)
    found = [search.run(Ring(seeds=[1], steps=STEPS, micro_batch_size=size), budget)[0] for size in (1, 7, 64)]
    found.append(search.run(Ring(seeds=[4, 1], steps=STEPS), budget)[1])
    for each in found[1:]:
        assert torch.equal(each.results, found[0].results)
        assert torch.equal(each.log_weights, found[0].log_weights)


def test_failures_leave_and_are_counted():
    class Failing(Ring):
        def rate(self, results, prompts):
            values = self.reward(results).masked_fill(results[:, 0, 0] > 3, math.nan)
            self.count_scores(values, prompts)
            return values

    (found,) = Gibbs(num_particles=6).run(Failing(steps=STEPS), Budget(nfe=60 * STEPS))
    assert 0 < len(found) < 60
    assert (found.results[:, 0, 0] <= 3).all()
    assert found.log_weights.exp().sum() == pytest.approx(1)

    class Dead(Ring):
        def rate(self, results, prompts):
            return torch.full((len(results),), math.nan)

    (found,) = Gibbs(num_particles=3).run(Dead(steps=STEPS), Budget(nfe=9 * STEPS))
    assert len(found) == 0
    assert found.log_z is None


def test_what_it_cannot_search_is_refused():
    with pytest.raises(ValueError, match="eta above 0"):
        Gibbs().run(Ring(steps=STEPS, law=DDIM(0.0)), Budget(nfe=1000))
    with pytest.raises(ValueError, match="takes two or more"):
        Gibbs().run(Ring(steps=STEPS), Budget(nfe=STEPS))
    with pytest.raises(ValueError, match="pays for no whole chain"):
        Gibbs().run(Ring(steps=STEPS), Budget(nfe=STEPS - 1))
