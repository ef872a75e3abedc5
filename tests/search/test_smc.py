"""SMC on problems whose targets are known; the defects of other codes, each as a test."""

import math

import numpy as np
import pytest
import torch

from diffalign import media
from diffalign.laws import DDIM
from diffalign.policies import Policy, tiny
from diffalign.search.best_of_n import BestOfN, Importance
from diffalign.search.budget import Budget
from diffalign.search.particles import Swarm, log_evidence, multinomial, with_neutral
from diffalign.search.smc import SMC
from diffalign.search.space import Rows
from diffalign.search.weights import effective_size
from tests.search.discrete import Enumerable
from tests.search.problems import Ring

STEPS, INF = 20, math.inf
POTENTIALS = ["diff", "max", "add", "rt"]


class Exact(SMC):
    """With the exact value of a state in the place of the reward of a guess."""

    def look(self, space, rows, paths, compare):
        return space.predict(rows), space.soft_value(rows) if compare else None


def ratio_of_z(search, space, nfe):
    """Estimates of Z over Z, one a prompt, and their standard error."""
    z = np.exp([found.log_z - space.log_z for found in search.run(space, Budget(nfe=nfe))])
    return z.mean(), z.std() / math.sqrt(len(z))


def swarm_of(log_weights, potential="diff"):
    """One prompt's particles, at a state of no matter."""
    count = len(log_weights)
    zeros = torch.zeros(count, dtype=torch.long)
    swarm = Swarm(Rows(torch.arange(count), zeros, zeros), 1, potential)
    swarm.log_weights = torch.tensor([log_weights], dtype=torch.float64)
    return swarm


@pytest.mark.parametrize(
    ("potential", "twists"),
    [("diff", [-4, -1, -2]), ("rt", [-4, -5, -7]), ("max", [-4, -5, -6]), ("add", [-4, -9, -16])],
)
def test_potentials_are_those_of_the_paper(potential, twists):
    """Three levels with lambda r = -4, -1, -2: the sum of log G so far. A max that began with 0 would be 0 always."""
    swarm = swarm_of([0.0], potential)
    seen = [float(swarm.log_twist) for value in (-4.0, -1.0, -2.0) if swarm.twist(torch.tensor([value]).double()).all()]
    assert seen == twists


def test_copies_carry_weights_whose_mean_is_right_for_every_draw():
    """The expectation of the copies' weights, over who is copied, is the weight that a particle had."""
    swarm = swarm_of([0.3, -1.0, 2.0, 0.0])
    swarm.twist(torch.tensor([1.0, -2.0, 0.5, 3.0]).double())
    weights, share = swarm.log_weights[0].exp(), (swarm.log_weights + swarm.log_twist)[0].softmax(0)
    swarm.copy(torch.arange(4)[None], torch.tensor([True]))
    assert torch.allclose(4 * share * swarm.log_weights[0].exp(), weights)


def test_prompts_that_are_not_resampled_keep_everything():
    zeros = torch.zeros(4, dtype=torch.long)
    swarm = Swarm(Rows(torch.arange(4), zeros, zeros), 2)
    swarm.twist(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    index = swarm.copy(torch.tensor([[1, 1], [0, 0]]), torch.tensor([True, False]))
    assert index.tolist() == swarm.rows.x.tolist() == [1, 1, 2, 3]
    assert swarm.ancestors.tolist() == [[1, 1], [0, 1]]
    assert swarm.log_twist.tolist() == [[2, 2], [3, 4]]
    assert swarm.log_weights[1].tolist() == [0, 0]
    assert (swarm.log_weights[0] < 0).all()


def test_failed_potentials_are_neutral():
    values = torch.tensor([[0.0, math.nan, math.log(3)], [math.nan] * 3], dtype=torch.float64)
    assert torch.allclose(with_neutral(values)[0], torch.tensor([0.0, math.log(2), math.log(3)]).double())
    swarm = swarm_of([0.0, 0.0])
    swarm.twist(torch.tensor([1.0, 2.0]).double())
    assert not swarm.twist(torch.full((2,), math.nan).double()).any()
    assert swarm.log_twist.tolist() == [[1, 2]]


def test_evidence_leaves_out_what_failed_as_independent_samples_do():
    rewards = torch.tensor([0.0, math.log(3), math.nan, math.nan], dtype=torch.float64)
    assert log_evidence(torch.zeros(4).double(), rewards) == pytest.approx(math.log(2))
    assert log_evidence(torch.zeros(1).double(), rewards[2:3]) is None


def test_multinomial_draws_by_weight():
    log_weights = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.0, 1.0]], dtype=torch.float64).log()
    uniforms = (torch.arange(8000, dtype=torch.float64) + 0.5).repeat(2, 1) / 8000
    counts = torch.stack([torch.bincount(row, minlength=3) for row in multinomial(log_weights, uniforms)])
    assert counts.tolist() == [[1000, 2000, 5000], [6000, 0, 2000]]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_z_is_unbiased_whatever_the_potential(potential):
    """Resampled at every level and by half the tilt's powers, K = 16; 160 seeds."""
    space = Enumerable(seeds=range(160))
    mean, error = ratio_of_z(SMC(potential=potential, ess_threshold=1.0, resample_levels=[0.4, 0.7]), space, 16 * 6)
    assert error < {"diff": 0.1, "rt": 0.3}.get(potential, 0.5)
    assert abs(mean - 1) < 3.5 * error


def test_z_is_unbiased_when_resampling_is_adaptive():
    """Weights that are dropped where resampling does not happen make it too small or too large."""
    space = Enumerable(seeds=range(160))
    mean, error = ratio_of_z(SMC(ess_threshold=0.5, resample_levels=None), space, 16 * 6)
    assert error < 0.1
    assert abs(mean - 1) < 3.5 * error


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_more_particles_come_nearer_to_the_target(threshold):
    space = Enumerable(seeds=range(10))
    search = SMC(ess_threshold=threshold, resample_levels=None)
    few, many = (
        np.mean([space.total_variation(each.results, each.log_weights) for each in search.run(space, Budget(nfe=nfe))])
        for nfe in (200, 1500)
    )
    assert many < 0.6 * few
    assert many < 0.25


@pytest.mark.parametrize("space", [Ring(seeds=range(4), steps=50), Enumerable(seeds=range(10))], ids=["ring", "tokens"])
def test_exact_values_keep_weights_uniform(space, monkeypatch):
    """Up to what one step tells anew: resampled at every level, particles are worth K before each, and Z is exact."""
    sizes = []

    def uneven(swarm, threshold):
        sizes.append(effective_size(swarm.log_weights + swarm.log_twist) / swarm.size)
        return torch.ones(len(swarm.log_weights), dtype=torch.bool)

    monkeypatch.setattr(Swarm, "uneven", uneven)
    found = Exact(resample_levels=None).run(space, Budget(nfe=100 * space.num_steps))
    least = torch.stack(sizes).min()
    assert least > (0.7 if isinstance(space, Ring) else 0.3)
    assert abs(np.mean([each.log_z - space.log_z for each in found])) < 0.1
    if isinstance(space, Ring):
        sizes.clear()
        SMC(resample_levels=None).run(space, Budget(nfe=100 * space.num_steps))
        assert torch.stack(sizes).min() < 0.2


@pytest.mark.parametrize("potential", POTENTIALS)
def test_lambda_of_zero_gives_the_prior(potential):
    budget, seeds = Budget(nfe=50 * STEPS), range(2)
    found = SMC(target_lambda=0.0, ess_threshold=1.0, potential=potential).run(Ring(seeds=seeds, steps=STEPS), budget)
    plain = BestOfN().run(Ring(seeds=seeds, steps=STEPS), budget)
    for each, independent in zip(found, plain, strict=True):
        assert torch.equal(each.results, independent.results)
        assert each.log_z == 0
        assert not each.log_weights.any()
        assert each.ancestors.tolist() == list(range(50))


def test_without_resampling_it_is_importance_resampling():
    budget = Budget(nfe=50 * STEPS)
    (found,) = SMC(ess_threshold=0.0).run(Ring(steps=STEPS), budget)
    (plain,) = Importance().run(Ring(steps=STEPS), budget)
    assert torch.equal(found.results, plain.results)
    assert torch.equal(found.log_weights, plain.log_weights)
    assert found.log_z == pytest.approx(plain.log_z, abs=1e-12)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_micro_batches_and_neighbours_change_nothing(potential):
    search, budget = SMC(potential=potential, num_particles=35), Budget(nfe=70 * 6)
    alone = [search.run(Ring(seeds=[1], steps=6, micro_batch_size=size), budget)[0] for size in (1, 7, 64)]
    beside = search.run(Ring(seeds=[5, 1, 2], steps=6), budget)[1]
    assert len(alone[0].ancestors.unique()) < 60  # some were copied
    for each in (*alone[1:], beside):
        assert torch.equal(each.results, alone[0].results)
        assert torch.equal(each.log_weights, alone[0].log_weights)


def test_independent_runs_are_pooled_by_their_estimates_of_z():
    space = Ring(steps=STEPS)
    (found,) = SMC(num_particles=20).run(space, Budget(nfe=59 * STEPS))
    assert len(found) == 40
    assert found.ledger.denoiser_evaluations == 40 * STEPS
    runs = found.log_weights.reshape(2, 20).logsumexp(1) - math.log(20)
    assert found.log_z == pytest.approx(float(runs.logsumexp(0)) - math.log(2))
    assert found.ancestors[:20].max() < 20 <= found.ancestors[20:].min()


def test_a_guess_costs_a_score_and_no_evaluation():
    space = Ring(steps=STEPS)
    (found,) = SMC(resample_levels=[0.25, 0.5]).run(space, Budget(nfe=30 * STEPS + 5))
    assert len(found) == 30
    assert found.ledger.denoiser_evaluations == 30 * STEPS
    assert found.ledger.reward_calls == 90
    (found,) = SMC(resample_levels=[0.25, 0.5]).run(space, Budget(reward_calls=92))
    assert len(found) == 30
    tokens = Enumerable()
    (found,) = SMC(resample_levels=[0.5], guess_draws=3).run(tokens, Budget(reward_calls=40))
    assert len(found) == 10
    assert found.ledger.reward_calls == 40


def test_ancestors_tell_where_a_result_began():
    class Frozen(Ring):
        def advance(self, rows, output, paths):
            return Rows(rows.x, rows.steps + 1, rows.prompts)

    space = Frozen(seeds=range(2), steps=STEPS)
    for prompt, found in enumerate(SMC(ess_threshold=1.0, num_particles=8).run(space, Budget(nfe=16 * STEPS))):
        paths = [(number,) for number in found.ancestors.tolist()]
        first = space.initial(torch.full((16,), prompt), paths)
        assert torch.equal(found.results, first.x)
        assert len(set(paths)) < 12


class FailingGuesses(Enumerable):
    """No score for half of the guesses, by their first token; results that chains ended in have theirs."""

    def score_guesses(self, guesses, prompts):
        return super().score_guesses(guesses, prompts).masked_fill(guesses[:, 0] < 2, math.nan)


def test_guesses_that_fail_leave_the_target_as_it_is():
    mean, error = ratio_of_z(SMC(ess_threshold=1.0, resample_levels=None), FailingGuesses(seeds=range(160)), 16 * 6)
    assert error < 0.1
    assert abs(mean - 1) < 3.5 * error


def test_results_that_fail_leave_and_are_counted():
    class Failing(Ring):
        def rate(self, results, prompts):
            values = self.reward(results).masked_fill(results[:, 0, 0] > 3, math.nan)
            self.count_scores(values, prompts)
            return values

    (found,) = SMC(resample_levels=None).run(Failing(steps=STEPS), Budget(nfe=200 * STEPS))
    assert 0 < len(found) < 200
    assert (found.results[:, 0, 0] <= 3).all()
    assert found.ledger.reward_failures >= 200 - len(found)
    assert len(found.log_weights) == len(found.ancestors) == len(found)
    assert found.log_weights.isfinite().all()

    class Dead(Ring):
        def rate(self, results, prompts):
            return torch.full((len(results),), math.nan)

    (found,) = SMC(resample_levels=None).run(Dead(steps=STEPS), Budget(nfe=5 * STEPS))
    assert len(found) == 0
    assert found.log_z is None


def test_rewards_of_any_size_neither_overflow_nor_saturate():
    """exp(lambda r) is far beyond floating point; and its order still tells."""
    (found,) = SMC(target_lambda=1e5).run(Ring(steps=STEPS), Budget(nfe=50 * STEPS))
    assert found.log_weights.isfinite().all()
    assert math.isfinite(found.log_z)
    assert len(found.rewards.unique()) > 1


class Pushed(SMC):
    """Proposes from a Gaussian beside the chain's."""

    def propose(self, space, rows, output, paths):
        law = space.transition(rows, output)
        if not space.stochastic[int(rows.steps[0])]:
            return super().propose(space, rows, output, paths)
        x, push = space.draw(law, rows, paths), 0.3 * law.std[:, None, None] * torch.ones_like(rows.x)
        moved = type(law)(law.mean + push, law.std)
        return Rows(x + push, rows.steps + 1, rows.prompts), law.log_ratio(x + push, moved, "sum").double()


def test_another_proposal_is_weighed():
    """The mean of p / q is 1, and weighted averages are the prior's."""
    found = Pushed(target_lambda=0.0).run(Ring(seeds=range(200), steps=6), Budget(nfe=40 * 6))
    z = torch.tensor([each.log_z for each in found]).exp()
    first = torch.stack([each.log_weights.exp() @ each.results[:, 0] / len(each) for each in found])
    plain = torch.stack([each.results[:, 0].mean(0) for each in found])
    error = first.std(0) / math.sqrt(200)
    assert abs(z.mean() - 1) < 3.5 * z.std() / math.sqrt(200)
    assert (first.mean(0).abs() < 3.5 * error).all()
    assert (plain.mean(0) > 8 * error).all()


def test_chains_whose_copies_stay_equal_are_refused():
    still = Ring(steps=STEPS, law=DDIM(0.0))
    with pytest.raises(ValueError, match=r"no step after those of .* is random.*eta above 0"):
        SMC().run(still, Budget(nfe=10 * STEPS))
    assert still.ledgers[0].denoiser_evaluations == 0
    with pytest.raises(ValueError, match=r"resample_levels = \[0.95\] is random"):
        SMC(resample_levels=[0.95]).run(Ring(steps=STEPS), Budget(nfe=10 * STEPS))
    assert SMC(resample_levels=[0.5, 0.95]).run(Ring(steps=STEPS), Budget(nfe=200))[0].ledger.reward_calls == 20
    with pytest.raises(ValueError, match="give num_particles"):
        SMC().run(Ring(steps=STEPS), Budget(seconds=1.0))
    with pytest.raises(ValueError, match="no shares of the steps"):
        SMC(resample_levels=[1.0])


def test_a_guess_is_no_candidate_for_the_best_image():
    """The reward falls from call to call, so guesses have the highest."""
    calls = []

    def waning(images, prompts, metadata):
        calls.append(len(images))
        return images.mean((1, 2, 3)) - 10 * len(calls)

    policy = Policy.wrap(tiny.tiny_sd())
    search = SMC(policy, waning, num_particles=3, num_inference_steps=4, guidance_scale=3.0, height=16, width=16)
    found = search.search("a dog", nfe=3 * 4 * 2)
    assert calls == [3, 3, 3, 3]  # before steps 1, 2 and 3, and at the end
    pixels = media.to_uint8(media.quantise(policy.decode(found.results)))
    assert torch.equal(found.best_image, pixels[found.best])


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("search", "variation"), [(SMC(), 0.187), (Exact(resample_levels=None), 0.122)], ids=["guess", "exact"]
)
def test_rare_events_are_sampled_as_well_as_by_an_independent_implementation(search, variation):
    """TV on the product of eight rings, 20 seeds at 1e5 evaluations; importance resampling has .45."""
    ring = Ring(planes=8, steps=50, seeds=range(20))
    found = search.run(ring, Budget(nfe=100_000))
    variations = np.array([ring.total_variation(each.results[each.draw(2000)]) for each in found])
    assert variations.mean() < variation + 2 * variations.std() / math.sqrt(20)


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("nfe", "variation", "reward"), [(10_000, 0.200, -0.83), (100_000, 0.072, -0.58)])
def test_the_ring_is_sampled_as_well_as_by_an_independent_implementation(nfe, variation, reward):
    """TV and E r of 20 seeds; the exact E r is -0.430."""
    ring = Ring(seeds=range(20))
    found = SMC().run(ring, Budget(nfe=nfe))
    variations = np.array([ring.total_variation(each.results[each.draw(2000)]) for each in found])
    rewards = np.array([float(each.log_weights.softmax(0) @ each.rewards) for each in found])
    assert variations.mean() < variation + 2 * variations.std() / math.sqrt(20)
    assert abs(rewards.mean() + 0.43) < abs(reward + 0.43) + 2 * rewards.std() / math.sqrt(20)
