"""Twisted particles: weights against closed forms and exact values; the defects of other codes, each as a test."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from diffalign.laws import DDIM, FlowGRPONoise, FlowODE, FlowSDE
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd3
from diffalign.search.best_of_n import BestOfN
from diffalign.search.budget import Budget
from diffalign.search.guidance import Guidance, Slope, slope_at
from diffalign.search.smc import SMC
from diffalign.search.space import Rows
from diffalign.search.twisted import DAS, TDS, Twisted, raised
from diffalign.search.weights import effective_size
from tests.search.digits import cosine_levels
from tests.search.discrete import Enumerable
from tests.search.placed import Placed, flow_levels
from tests.search.problems import Ring, Toy

STEPS = 10
SEARCHES = {"tds": TDS, "das": DAS, "adaptive": lambda **given: DAS(tempering="adaptive", **given)}
methods = pytest.mark.parametrize("method", SEARCHES.values(), ids=SEARCHES)


class Line(Toy):
    """p = N(0, I) with its exact denoiser, and r = b x: the chain is Gaussian, so that Z is known.

    Attributes:
        log_z: of the chain of these steps, whose variance is a little below 1.
    """

    def __init__(self, slope=1.0, seeds=(0,), steps=STEPS):
        super().__init__(DDIM(1.0), cosine_levels(steps), (3,), "sample", ids=list(seeds), dtype=torch.float64)
        self.slope, variance = slope * torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), 1.0
        for step in range(steps):
            rows = Rows(torch.ones(1, 3, dtype=torch.float64), torch.tensor([step]), torch.tensor([0]))
            law = self.transition(rows, self.evaluate(rows))
            variance = float(law.mean[0, 0] ** 2 * variance + law.std**2)
        self.log_z = 0.5 * variance * float(self.slope.square().sum())

    def evaluate(self, rows):
        return self.schedule.level(rows.steps).alpha[:, None] * rows.x

    def rate(self, results, prompts):
        values = results @ self.slope
        self.count_scores(values, prompts)
        return values


def exact(space, rows, paths, scale):
    """In the place of `slope_at`: the exact value of a state and its gradient."""
    with torch.enable_grad():
        x = rows.x.clone().requires_grad_()
        value = scale * space.soft_value(Rows(x, rows.steps, rows.prompts))
    return Slope(space.predict(rows), value.detach(), torch.autograd.grad(value, x, torch.ones_like(value))[0])


@methods
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_z_is_unbiased(method, threshold):
    """K = 16; 200 seeds. Weights without p / q, or with that of another step, are far off."""
    space = Line(seeds=range(200))
    found = method(ess_threshold=threshold).run(space, Budget(nfe=16 * STEPS))
    ratio = np.exp([each.log_z - space.log_z for each in found])
    error = ratio.std() / math.sqrt(200)
    assert error < 0.04
    assert abs(ratio.mean() - 1) < 3.5 * error


@methods
def test_weighted_averages_are_those_of_the_target(method):
    """Its mean is V b, of the unit covariance V I of the chain; the ends of pushed chains are elsewhere."""
    space = Line(seeds=range(100))
    found = method().run(space, Budget(nfe=32 * STEPS))
    means = torch.stack([each.log_weights.softmax(0) @ each.results for each in found])
    variance = 2 * space.log_z / float(space.slope.square().sum())
    error = means.std(0) / math.sqrt(100)
    assert (error < 0.03).all()
    assert ((means.mean(0) - variance * space.slope).abs() < 3.5 * error + 0.02).all()  # a ratio of means is biased


def test_weights_are_products_of_density_ratios():
    """One step without resampling, by torch.distributions."""
    space = Line(steps=2)
    (found,) = TDS(ess_threshold=0.0, target_lambda=0.7).run(space, Budget(nfe=2 * 5))
    rows = space.initial(torch.zeros(5, dtype=torch.long), [(k,) for k in range(5)])
    law = space.transition(rows, space.evaluate(rows))
    alpha, std = space.schedule.alpha[0], float(law.std[0])
    pushed = law.mean + std**2 * 0.7 * alpha * space.slope
    x = pushed + std * space.noise("step", rows.prompts, [(k,) for k in range(5)], rows.steps)
    chain, proposal = (torch.distributions.Normal(mean, std).log_prob(x).sum(1) for mean in (law.mean, pushed))
    last = space.transition(Rows(x, rows.steps + 1, rows.prompts), space.schedule.alpha[1] * x).mean
    assert torch.allclose(found.results, last)
    assert torch.allclose(found.log_weights, chain - proposal + 0.7 * found.rewards)


@pytest.mark.parametrize(
    ("levels", "law"), [(cosine_levels, DDIM(1.0)), (flow_levels, FlowSDE(FlowGRPONoise(math.sqrt(2))))]
)
def test_with_exact_values_weights_stay_even(monkeypatch, levels, law):
    """Up to the size of the step: effective sizes of 0.8 and 0.6 of K at 50 steps, where guesses leave 0.05."""
    space = Placed(levels(50), law, seeds=range(4))
    (rough, *_) = TDS(ess_threshold=0.0).run(space, Budget(nfe=50 * 50))
    monkeypatch.setattr("diffalign.search.twisted.slope_at", exact)
    found = TDS(ess_threshold=0.0).run(space, Budget(nfe=50 * 50))
    assert np.mean([each.effective_size / 50 for each in found]) > 0.55 > 4 * rough.effective_size / 50
    assert abs(np.mean([each.log_z for each in found]) - space.log_z) < 0.15


@methods
def test_lambda_of_zero_gives_the_prior(method):
    found = method(target_lambda=0.0, ess_threshold=1.0).run(Ring(seeds=[0, 4], steps=STEPS), Budget(nfe=20 * STEPS))
    plain = BestOfN().run(Ring(seeds=[0, 4], steps=STEPS), Budget(nfe=20 * STEPS))
    for each, base in zip(found, plain, strict=True):
        assert torch.equal(each.results, base.results)
        assert not each.log_weights.any()
        assert each.ancestors.tolist() == list(range(20))


@methods
def test_micro_batches_and_neighbours_change_nothing(method):
    search, budget = method(num_particles=8), Budget(nfe=16 * 6)
    alone = [search.run(Ring(seeds=[1], steps=6, micro_batch_size=size), budget)[0] for size in (1, 7, 64)]
    beside = search.run(Ring(seeds=[5, 1, 2], steps=6), budget)[1]
    for each in (*alone[1:], beside):
        assert torch.allclose(each.results, alone[0].results, rtol=1e-8, atol=1e-8)
        assert torch.allclose(each.log_weights, alone[0].log_weights, rtol=1e-8, atol=1e-8)


@methods
def test_a_level_costs_one_pass_each_way_and_one_score(method):
    space = Placed(cosine_levels(STEPS), DDIM(1.0))
    (found,) = method().run(space, Budget(nfe=9 * STEPS + 3))
    ledger = found.ledger
    assert len(found) == 9
    assert space.calls == ledger.denoiser_evaluations == 9 * STEPS
    assert (ledger.backward_passes, ledger.reward_calls) == (9 * (STEPS - 1), 9 * STEPS)
    (found,) = method().run(space, Budget(reward_calls=2 * STEPS + 1))
    assert len(found) == 2


def test_the_effective_size_decides_how_far_the_reward_is_raised():
    drawn = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights, values = 0.3 * drawn.flip(1), torch.tensor([[0.1], [3.0], [8.0], [8.0]]) * drawn
    log_weights[3] *= 20
    before = torch.tensor([0.0, 0.1, 0.0, 0.2], dtype=torch.float64)
    gamma = raised(log_weights, values, before, 0.5)
    assert gamma[[0, 3]].tolist() == [1.0, 0.2]  # as far as it goes; nowhere, as it is uneven already
    for row in (1, 2):
        root = brentq(lambda g, r=row: float(effective_size(log_weights[r] + g * values[r])) - 15, before[row], 1)
        assert gamma[row] == pytest.approx(root, abs=1e-9)


def test_the_schedule_is_that_of_the_paper_in_hundredths_of_the_chain():
    """Of 100 steps the 88th is the first with gamma = 1; the proposal is one step ahead."""
    gammas, none = [], torch.zeros(1)
    for step in range(100):
        twist, push = DAS().temper(None, none[None], none, step / 100, (step + 1) / 100)
        gammas.append((float(twist), float(push)))
    assert gammas[0] == (0.0, pytest.approx(0.008))
    assert gammas[86][0] < 1 == gammas[87][0] == gammas[86][1]
    assert all(now[1] == pytest.approx(then[0]) for now, then in itertools.pairwise(gammas))


class Failing(Line):
    """No score for half of the guesses; results have theirs."""

    def rate_guesses(self, guesses, prompts):
        return super().rate_guesses(guesses, prompts).masked_fill(guesses[:, 0].detach() < 0, math.nan)


@methods
def test_guesses_that_fail_leave_the_target_as_it_is(method):
    space = Failing(seeds=range(200))
    found = method().run(space, Budget(nfe=16 * STEPS))
    ratio = np.exp([each.log_z - space.log_z for each in found])
    assert abs(ratio.mean() - 1) < 3.5 * ratio.std() / math.sqrt(200) < 0.25
    assert len(found[0]) == 16


def test_a_failed_guess_does_not_push_its_particle():
    space = Failing()
    rows = space.initial(torch.zeros(8, dtype=torch.long), [(k,) for k in range(8)])
    slope = slope_at(space, rows, [(k,) for k in range(8)], 1.0)
    failed = slope.value.isnan()
    assert 0 < failed.sum() < 8
    assert slope.gradient.any(1).equal(~failed)


def test_what_cannot_be_weighed_is_refused():
    black = Ring(steps=STEPS)
    black.differentiable = False
    for space, told in (
        (Ring(steps=STEPS, law=DDIM(0.0)), r"no step of the chain is random, so tds has no density.*eta above 0"),
        (Placed(flow_levels(STEPS), FlowODE(), "velocity"), "no step of the chain is random"),
        (black, "tds follows the gradient of the reward, which has none"),
        (Enumerable(), "tds follows a gradient, and categorical steps have none"),
    ):
        with pytest.raises(ValueError, match=told):
            TDS().run(space, Budget(nfe=1000))
        assert space.ledgers[0].denoiser_evaluations == 0
    with pytest.raises(ValueError, match="give num_particles"):
        DAS().run(Ring(steps=STEPS), Budget(seconds=1.0))


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def test_pipelines_are_sampled():
    policy = Policy.wrap(tiny_sd3())
    chain = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}
    for method in (TDS, DAS):
        found = method(policy, redness, target_lambda=20.0, **chain).search(["a bad dog", "a fine lake"], nfe=24)
        for each in found:
            assert len(each) == 4
            assert each.log_weights.isfinite().all()
            assert math.isfinite(each.log_z)
            assert each.best_image is not None


@pytest.mark.verify
def test_the_ring_at_ten_thousand_evaluations():
    """TV and log Z of 20 seeds, K = 100. Guesses mislead here: SMC without gradients is nearer, and costs half."""
    ring = Ring(seeds=range(20))
    bounds = {"tds": 0.16, "das": 0.11, "adaptive": 0.11}
    guided = np.mean([ring.total_variation(each.results) for each in Guidance(wave=100).run(ring, Budget(nfe=10_000))])
    for name, method in SEARCHES.items():
        found = method().run(ring, Budget(nfe=10_000))
        variations = np.array([ring.total_variation(each.results[each.draw(2000)]) for each in found])
        assert variations.mean() < bounds[name] + 2 * variations.std() / math.sqrt(20)
        assert variations.mean() < guided / 2
    assert issubclass(Twisted, SMC)
