"""Gradient guidance: shifts against finite differences and closed forms; the defects of other codes, each as a test."""

import math

import pytest
import torch

from diffalign import media
from diffalign.laws import DDIM, FlowODE, FlowSDE
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux, tiny_sdxl
from diffalign.rewards import as_reward
from diffalign.rewards.noisy import NoisyReward
from diffalign.search.best_of_n import BestOfN
from diffalign.search.budget import Budget
from diffalign.search.config import ChainConfig
from diffalign.search.guidance import Guidance, Slope, gradient_of, slope_at, with_guess, with_score
from diffalign.search.nrg import NRG
from diffalign.search.policy_space import PolicySpace
from diffalign.search.space import Rows
from tests.search.digits import cosine_levels
from tests.search.discrete import Enumerable
from tests.search.placed import Placed, flow_levels
from tests.search.problems import Ring

STEPS = 10
KINDS = ["dps", "lgd", "universal", "mpgd"]
OUTPUTS = ["epsilon", "v_prediction", "sample", "velocity"]
LAWS = {"ancestral": DDIM(1.0), "ode": FlowODE(), "sde": FlowSDE()}
CHAIN = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}


class Exact(NRG):
    """Guided by the value that an ideal noise-aware reward has."""

    def __init__(self, **settings):
        super().__init__(noisy_reward="exact", **settings)

    def check(self, space):
        """Any space."""

    def noisy_rewards(self, space, rows):
        return space.soft_value(rows)


def on(levels, law, kind="sample", **settings):
    return Placed(levels(STEPS), LAWS[law], kind, **settings)


def standing(space, count=5):
    """Rows at different steps, and their paths."""
    paths = [(k,) for k in range(count)]
    x = 1.5 * space.initial(torch.zeros(count, dtype=torch.long), paths).x
    return Rows(x, torch.arange(count) + 3, torch.zeros(count, dtype=torch.long)), paths


def potential(space, rows, x, scale, draws):
    """Log mean exp of scale r at the predicted clean sample, noised `draws` times: the formula, in one piece."""
    rows = Rows(x, rows.steps, rows.prompts)
    guess = space.prediction(rows, space.evaluate(rows)).x0
    level = space.schedule.level(rows.steps)
    spread = (1 + (level.alpha / level.sigma) ** 2) ** -0.5
    if not draws:
        return scale * space.reward(guess)
    noise = [
        space.noise(f"guess {k}", rows.prompts, [(k,) for k in range(len(rows))], rows.steps) for k in range(draws)
    ]
    each = torch.stack([scale * space.reward(guess + spread[:, None, None] * e) for e in noise])
    return each.exp().mean(0).log()


@pytest.mark.parametrize("draws", [0, 3])
def test_the_gradient_is_that_of_finite_differences(draws):
    space = on(flow_levels, "sde", "velocity", planes=2, micro_batch_size=2)
    rows, paths = standing(space)
    slope = slope_at(space, rows, paths, 0.7, draws)
    assert torch.allclose(slope.value, potential(space, rows, rows.x, 0.7, draws))
    for index in range(4):
        push = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor([index]), 1e-5).reshape(2, 2)
        up, down = (potential(space, rows, rows.x + sign * push, 0.7, draws) for sign in (1, -1))
        assert torch.allclose(slope.gradient.flatten(1)[:, index], (up - down) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_gradient_at_the_guess_leaves_the_denoiser_out():
    space = on(cosine_levels, "ancestral")
    rows, paths = standing(space)
    with torch.enable_grad():
        guess = space.evaluate(rows).requires_grad_()
        value = 0.7 * space.reward(guess)
    slope = slope_at(space, rows, paths, 0.7, through=False)
    assert torch.allclose(slope.gradient, torch.autograd.grad(value, guess, torch.ones_like(value))[0])
    assert space.ledgers[0].backward_passes == 0


def test_draws_that_do_not_differ_give_the_gradient_of_one():
    """Dividing by their number after the logarithm would make it that much smaller."""

    class Still(Placed):
        def noise(self, purpose, prompts, paths, steps):
            return super().noise(purpose, prompts, paths, steps) * (purpose in ("initial", "step"))

    space = Still(cosine_levels(STEPS), DDIM(1.0))
    rows, paths = standing(space)
    one, many = (slope_at(space, rows, paths, 1.0, draws) for draws in (0, 5))
    assert torch.allclose(one.gradient, many.gradient)
    assert torch.allclose(one.value, many.value)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_shifts_of_the_prediction_are_those_of_the_score(kind):
    """By noise = -sigma score and Tweedie's formula, whatever the network says."""
    levels = flow_levels if kind == "velocity" else cosine_levels
    space = on(levels, "ancestral", kind)
    rows, _ = standing(space)
    level, output, push = space.schedule.level(rows.steps), space.evaluate(rows), torch.randn_like(rows.x)
    alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
    plain, moved = space.prediction(rows, output), space.prediction(rows, with_score(space, rows, output, push))
    assert torch.allclose(moved.noise, plain.noise - sigma * push)
    assert torch.allclose(moved.x0, (rows.x + sigma**2 * (-plain.noise / sigma + push)) / alpha)
    if kind == "velocity":
        assert torch.allclose(moved.output, output - sigma / (1 - sigma) * push)
    elsewhere = space.prediction(*with_guess(space, rows, output, push))
    assert torch.allclose(elsewhere.noise, plain.noise)
    assert torch.allclose(elsewhere.x0, plain.x0 + sigma**2 / (alpha**2 + sigma**2) * push)


def test_a_noisy_law_is_pushed_by_its_variance_and_one_without_noise_by_the_score():
    rows, paths = standing(on(flow_levels, "sde"))
    for law in ("sde", "ode"):
        space = on(flow_levels, law, "velocity")
        plain = space.transition(rows, space.evaluate(rows))
        slope = slope_at(space, rows, paths, 2.0)
        pushed = Guidance(scale=2.0).transition(space, rows, paths)
        universal = Guidance(scale=2.0, kind="universal").transition(space, rows, paths)
        assert torch.equal(pushed.std, plain.std)
        assert torch.equal(universal.std, plain.std)
        if law == "sde":
            assert torch.allclose(pushed.mean - plain.mean, plain.std[:, None, None] ** 2 * slope.gradient)
        else:
            assert torch.allclose(pushed.mean, universal.mean)
            level, to = space.schedule.level(rows.steps), space.schedule.target(rows.steps)
            factor = (level.sigma - to.sigma) * level.sigma / level.alpha
            assert torch.allclose(universal.mean - plain.mean, factor[:, None, None] * slope.gradient)


def test_ancestral_steps_are_pushed_alike_by_variance_and_score():
    """Up to the size of the step; another law of less noise is not."""
    ratios = []
    for steps in (100, 400):
        space = Placed(cosine_levels(steps), DDIM(1.0))
        rows, paths = standing(space)
        rows = Rows(rows.x, torch.full_like(rows.steps, steps // 2), rows.prompts)
        plain = space.transition(rows, space.evaluate(rows)).mean
        moves = [Guidance(kind=kind).transition(space, rows, paths).mean - plain for kind in ("dps", "universal")]
        ratios.append(float(moves[0].norm() / moves[1].norm()))
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1) / 3.5 < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_one_forward_and_at_most_one_backward_pass(kind):
    space = on(cosine_levels, "ancestral")
    (found,) = Guidance(kind=kind, draws=3).run(space, Budget(nfe=7 * STEPS + 3))
    guided = STEPS - 1 if kind in ("dps", "lgd") else STEPS  # the last step has no variance
    assert len(found) == 7
    assert space.calls == found.ledger.denoiser_evaluations == 7 * STEPS
    assert found.ledger.backward_passes == (0 if kind == "mpgd" else 7 * guided)
    assert found.ledger.reward_calls == 7 * (1 + guided * (3 if kind == "lgd" else 1))
    assert found.log_weights is None
    assert found.log_z is None
    (found,) = Guidance(kind=kind, draws=3).run(space, Budget(reward_calls=2 * found.ledger.reward_calls // 7 + 5))
    assert len(found) == 2


@pytest.mark.parametrize("search", [*(Guidance(kind=kind, scale=0.0) for kind in KINDS), Exact(scale=0.0)])
def test_a_scale_of_zero_gives_the_samples_of_best_of_n(search):
    for space in (Ring(steps=STEPS), on(flow_levels, "ode", "velocity")):
        (found,), (plain,) = (each.run(space, Budget(nfe=20 * STEPS)) for each in (search, BestOfN()))
        assert torch.equal(found.results, plain.results)
        assert torch.equal(found.rewards, plain.rewards)
        assert found.ledger.reward_calls == 20


@pytest.mark.parametrize("search", [*(Guidance(kind=kind, wave=3) for kind in KINDS), Exact(wave=3)])
def test_micro_batches_and_neighbours_change_nothing(search):
    """A norm over the whole batch would couple its samples."""
    alone = [search.run(Ring(seeds=[1], steps=6, micro_batch_size=size), Budget(nfe=30))[0] for size in (1, 7, 64)]
    beside = search.run(Ring(seeds=[5, 1, 2], steps=6), Budget(nfe=30))[1]
    for each in (*alone[1:], beside):
        assert torch.allclose(each.results, alone[0].results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["universal", "mpgd"])
def test_guidance_raises_the_reward(kind):
    (plain,), (found,) = (each.run(Ring(steps=20), Budget(nfe=2000)) for each in (BestOfN(), Guidance(kind=kind)))
    gain = found.rewards - plain.rewards  # of the same noise
    assert gain.mean() > 2.5 * gain.std() / 10


class Failing(Ring):
    """No score on one side."""

    def rate(self, results, prompts):
        values = self.reward(results).masked_fill(results[:, 0, 0].detach() > 0.5, math.nan)
        self.count_scores(values, prompts)
        return values


@pytest.mark.parametrize("draws", [0, 4])
def test_guesses_that_fail_do_not_guide(draws):
    space = Failing(steps=STEPS)
    rows, paths = standing(space, 6)
    with torch.no_grad():
        failed = space.evaluate(rows)[:, 0, 0] > 0.5
    slope, plain = slope_at(space, rows, paths, 1.0, draws), slope_at(Ring(steps=STEPS), rows, paths, 1.0, draws)
    if not draws:
        assert 0 < failed.sum() < 6
        assert slope.value.isnan().equal(failed)
        assert not slope.gradient[failed].any()
        assert torch.equal(slope.gradient[~failed], plain.gradient[~failed])
    assert slope.gradient.isfinite().all()
    assert slope.gradient[~slope.value.isnan()].any()
    (found,) = Guidance(kind="lgd" if draws else "dps").run(space, Budget(nfe=30 * STEPS))
    assert len(found)
    assert found.results.isfinite().all()


def test_what_has_no_gradient_is_refused():
    still = Ring(steps=STEPS)
    still.differentiable = False
    for space, search, told in (
        (Enumerable(), Guidance(), "guidance follows a gradient, and categorical steps have none"),
        (Enumerable(), NRG(noisy_reward="x"), "nrg follows a gradient, and categorical steps have none"),
        (still, Guidance(), "guidance follows the gradient of the reward, which has none"),
        (Ring(steps=STEPS), NRG(noisy_reward="x"), "nrg reads latents with the first blocks of a pipeline's denoiser"),
    ):
        with pytest.raises(ValueError, match=told):
            search.run(space, Budget(nfe=1000))
        assert space.ledgers[0].denoiser_evaluations == 0
    with pytest.raises(ValueError, match="scores carry no gradient"):
        gradient_of(torch.zeros(2), torch.zeros(2, 3))
    assert not gradient_of(torch.full((2,), math.nan), torch.zeros(2, 3)).any()


def test_states_of_pure_noise_are_not_guided():
    space = on(flow_levels, "ode", "velocity")
    assert space.schedule.alpha[0] == 0
    for search, backward in ((Guidance(kind="universal"), 3 * (STEPS - 1)), (Exact(), 0)):
        (found,) = search.run(space, Budget(nfe=3 * STEPS))
        assert found.results.isfinite().all()
        assert found.ledger.reward_calls == 3 * STEPS
        assert found.ledger.backward_passes == backward


@pytest.mark.parametrize(
    ("levels", "law", "kind"),
    [(cosine_levels, "ancestral", "sample"), (flow_levels, "ode", "velocity"), (flow_levels, "sde", "velocity")],
)
def test_an_ideal_noise_aware_reward_samples_the_target(levels, law, kind):
    """At 30 steps and n = 1000, where exact samples have TV .011: what is left is of the steps. Unguided: .65."""
    space = Placed(levels(30), LAWS[law], kind)
    (found,) = Exact(wave=1000).run(space, Budget(nfe=30_000))
    assert space.total_variation(found.results) < 0.035
    assert abs(float(found.rewards.mean()) + 0.43) < 0.1


@pytest.mark.verify
@pytest.mark.parametrize("law", LAWS)
def test_an_ideal_noise_aware_reward_samples_the_target_in_many_steps(law):
    """TV of n = 4000 at 100 steps; of exact samples it is .006."""
    space = Placed((cosine_levels if law == "ancestral" else flow_levels)(100), LAWS[law])
    (found,) = Exact(wave=4000).run(space, Budget(nfe=400_000))
    assert space.total_variation(found.results) < 0.02
    assert abs(float(found.rewards.mean()) + 0.43) < 0.05


@pytest.mark.verify
def test_dps_is_as_far_from_the_target_as_in_an_independent_implementation():
    """TV .46 and E r -2.5 at 100 samples, at scale 1."""
    ring = Ring(seeds=range(20))
    found = Guidance(wave=100).run(ring, Budget(nfe=10_000))
    variation = torch.tensor([ring.total_variation(each.results) for each in found])
    reward = torch.tensor([float(each.rewards.mean()) for each in found])
    assert abs(float(variation.mean()) - 0.46) < 0.02 + 2 * float(variation.std()) / math.sqrt(20)
    assert abs(float(reward.mean()) + 2.5) < 0.1 + 2 * float(reward.std()) / math.sqrt(20)


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.mark.parametrize(
    ("build", "kinds"),
    [(tiny_sd, ["dps"]), (tiny_sdxl, ["mpgd"]), (tiny_sd3, ["lgd", "universal"]), (tiny_flux, ["dps"])],
)
def test_pipelines_are_guided(build, kinds):
    policy = Policy.wrap(build())
    (plain,) = BestOfN(policy, redness, **CHAIN).search(["a bad dog"], nfe=8)
    for kind in kinds:
        (found,) = Guidance(policy, redness, kind=kind, scale=50.0, draws=2, **CHAIN).search(["a bad dog"], nfe=8)
        assert (found.rewards > plain.rewards).all()
        image = media.quantise(policy.decode(found.results))[found.best]  # none of the guesses, which may be above
        assert torch.equal(found.best_image, media.to_uint8(image))


def test_pipelines_refuse_rewards_without_gradient():
    reward = as_reward(redness, differentiable=False)
    with pytest.raises(ValueError, match="follows the gradient of the reward"):
        Guidance(Policy.wrap(tiny_sd()), reward, **CHAIN).search("a dog", nfe=100)


@pytest.fixture(scope="module", params=[tiny_sd, tiny_sd3])
def noisy_reward(request, tmp_path_factory):
    """(policy, folder) of an untrained noise-aware reward of two objectives."""
    policy = Policy.wrap(request.param())
    reward = NoisyReward(policy, {"first": 1.0, "second": 0.0}, blocks=1, hidden=16)
    return policy, str(reward.save(tmp_path_factory.mktemp("noisy")))


def test_the_prediction_is_shifted_by_the_mixed_noisy_reward_after_guidance(noisy_reward):
    policy, folder = noisy_reward
    search = NRG(policy, redness, noisy_reward=folder, weights={"first": 0.5, "second": -2.0}, scale=3.0, **CHAIN)
    space = PolicySpace(policy, redness, ["a bad dog", "a fine lake"], ChainConfig(**CHAIN, micro_batch_size=2))
    search.check(space)
    rows, paths = space.initial(torch.tensor([0, 1, 1]), [(0,), (0,), (1,)]), [(0,), (0,), (1,)]
    rows = Rows(rows.x, torch.full((3,), 2), rows.prompts)
    level, reward = space.schedule.level(rows.steps), NoisyReward.load(folder, policy)
    x = rows.x.clone().requires_grad_()
    scores = reward.scores(x, level, space.condition.rows(rows.prompts))
    (gradient,) = torch.autograd.grad(0.5 * scores[:, 0].sum() - 2 * scores[:, 1].sum(), x)
    with torch.no_grad():
        guided, sigma, alpha = space.evaluate(rows), level.sigma[:, None, None, None], level.alpha[:, None, None, None]
        factor = -sigma / alpha if space.kind == "velocity" else -sigma
        expected = space.transition(rows, guided + (3 * factor * gradient).float())
        assert torch.allclose(search.transition(space, rows, paths).mean, expected.mean, atol=1e-5)
    assert gradient.abs().max() > 0


def test_noisy_rewards_guide_without_a_backward_pass_of_the_denoiser(noisy_reward):
    policy, folder = noisy_reward
    search = NRG(policy, redness, noisy_reward=folder, scale=20.0, **CHAIN)
    found = search.search(["a bad dog", "a fine lake"], nfe=24)
    plain = BestOfN(policy, redness, **CHAIN).search(["a bad dog", "a fine lake"], nfe=24)
    for each, base in zip(found, plain, strict=True):
        assert len(each) == 3
        assert not torch.allclose(each.results, base.results)
        ledger = each.ledger
        assert (ledger.denoiser_evaluations, ledger.backward_passes, ledger.decodes) == (24, 0, 3)
        assert ledger.reward_calls == 3 + 3 * sum(policy.schedule(4, 16, 16).alpha[:4] > 0)
    with pytest.raises(ValueError, match="'third' is unknown"):
        NRG(policy, redness, noisy_reward=folder, weights={"third": 1.0}, **CHAIN).search("a dog", nfe=24)
    with pytest.raises(FileNotFoundError, match="holds no noise-aware reward"):
        NRG(policy, redness, noisy_reward="nowhere", **CHAIN).search("a dog", nfe=24)


def test_slopes_are_picked_by_row():
    slope = Slope(torch.arange(3), torch.arange(3), torch.arange(3))[torch.tensor([2, 2])]
    assert slope.output.tolist() == slope.value.tolist() == slope.gradient.tolist() == [2, 2]
