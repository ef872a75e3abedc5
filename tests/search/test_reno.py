"""Ascent in noise: ReNO and DNO on maps whose maximiser is known, and on a pipeline of the zoo."""

import math

import pytest
import torch

import diffalign as da
from diffalign.laws import DDIM
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_schnell, tiny_sd_turbo, tiny_sdxl
from diffalign.search.ascent import clip_rows, follow, noises
from diffalign.search.best_of_n import BestOfN
from diffalign.search.budget import Budget
from diffalign.search.config import ChainConfig
from diffalign.search.dno import DNO
from diffalign.search.masked import MaskedSpace
from diffalign.search.policy_space import PolicySpace
from diffalign.search.reno import ReNO
from tests.search.problems import Ring, Toy, linear_betas

N = 6  # elements
GAIN, SIDE = 0.2, 1.5


class Linear(Toy):
    """One step that predicts a x, and the reward -|x - b|^2 / 2."""

    def __init__(self, prompts=1, steps=1, law=None, micro_batch_size=None, fails=False):
        super().__init__(
            law or DDIM(0.0),
            linear_betas(steps),
            (N,),
            "sample",
            ids=list(range(prompts)),
            dtype=torch.float64,
            micro_batch_size=micro_batch_size,
        )
        self.centre = SIDE * torch.arange(1, N + 1, dtype=torch.float64) / math.sqrt(N * (N + 1) * (2 * N + 1) / 6)
        self.calls, self.fails = 0, fails

    def evaluate(self, rows):
        self.calls += 1
        return GAIN * rows.x

    def rate(self, results, prompts):
        values = -0.5 * (results - self.centre).square().sum(1)
        if self.fails:
            values = torch.where(values > values.detach().mean(), math.nan, values)
        self.count_scores(values, prompts)
        return values


def test_reno_finds_the_maximum_of_a_quadratic_reward_and_the_chi_law():
    """Along b the derivative is -a (a r - |b|) + w ((n - 1) / r - r), w the weight at this size: a square in r."""
    w = 0.05
    found = ReNO(regulariser_weight=w * N / 16384).run(Linear(), Budget(nfe=200))[0]
    a, b, c = GAIN**2 + w, -GAIN * SIDE, -w * (N - 1)
    norm = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    centre = Linear().centre
    assert torch.allclose(found.results[-1], GAIN * norm * centre / SIDE, atol=1e-5)
    alone = ReNO(regulariser_weight=0.0).run(Linear(), Budget(nfe=200))[0]
    assert torch.allclose(alone.results[-1], centre, atol=1e-5)  # without it, the reward's own


def test_the_first_step_is_nesterovs_with_a_clipped_gradient():
    space = Linear()
    noise = noises(space)[:, 0]
    gradient = GAIN * (space.centre - GAIN * noise)
    assert float(gradient.norm()) > 0.1
    expected = noise + 5.0 * 1.9 * 0.1 * gradient / gradient.norm()
    found = ReNO(regulariser_weight=0.0).run(space, Budget(nfe=2))[0]
    assert torch.allclose(found.results, GAIN * torch.cat([noise, expected]), atol=1e-12)


def slope(space, start):
    """The gradient of the reward with respect to all noises."""
    given, prompts = start.clone().requires_grad_(), torch.arange(len(start))
    return torch.autograd.grad(space.rate(follow(space, given, prompts, False), prompts).sum(), given)[0]


def test_dno_moves_every_noise_by_the_first_step_of_adam():
    """Whatever the gradient's size, the learning rate is how far it goes; weight decay takes a ten-thousandth."""
    space = Ring(steps=4)
    start = noises(space)
    assert start.shape[1] == 1 + sum(space.stochastic) == 4  # the last step is deterministic
    gradient = slope(space, start)
    expected = start * (1 - 1e-4) + 0.01 * gradient.sign()
    found = DNO().run(Ring(steps=4), Budget(nfe=8))[0]
    assert torch.allclose(found.results[1], follow(space, expected, torch.tensor([0]), False)[0], atol=1e-6)


def test_reno_leaves_injected_noise_as_it_is():
    space = Ring(steps=4)
    start = noises(space)
    gradient = slope(space, start)
    step = gradient[:, :1] * min(1.0, 0.1 / float(gradient[:, :1].norm()))
    expected = torch.cat([start[:, :1] + 5.0 * 1.9 * step, start[:, 1:]], 1)
    found = ReNO(regulariser_weight=0.0).run(Ring(steps=4), Budget(nfe=8))[0]
    assert torch.allclose(found.results[1], follow(space, expected, torch.tensor([0]), False)[0], atol=1e-9)


def test_the_gradient_of_a_chain_is_that_of_finite_differences():
    space = Ring(steps=3)
    prompts = torch.tensor([0])
    given = noises(space).requires_grad_()
    for recompute in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, again=recompute: space.rate(follow(space, x, prompts, again), prompts), (given,), atol=1e-4
        )


def test_following_the_addressed_noise_gives_the_sample_of_best_of_n():
    space = Ring(seeds=[3, 5], steps=5)
    sampled = BestOfN().run(space, Budget(nfe=5))
    with torch.no_grad():
        followed = follow(space, noises(space), torch.arange(2), False)
    assert torch.equal(followed, torch.cat([found.results for found in sampled]))


@pytest.mark.parametrize("search", [ReNO(learning_rate=1.0), DNO(regulariser_weight=0.1)], ids=["reno", "dno"])
def test_prompts_share_a_batch_and_nothing_else(search):
    together = search.run(Ring(planes=2, seeds=[1, 2, 3], steps=3), Budget(nfe=15))
    for number, seed in enumerate([1, 2, 3]):
        alone = search.run(Ring(planes=2, seeds=[seed], steps=3), Budget(nfe=15))[0]
        assert torch.allclose(alone.results, together[number].results, rtol=1e-9, atol=1e-9)
    halves = search.run(Ring(planes=2, seeds=[1, 2, 3], steps=3, micro_batch_size=2), Budget(nfe=15))
    assert all(torch.allclose(a.results, b.results, atol=1e-9) for a, b in zip(halves, together, strict=True))


def test_the_cost_is_counted_and_the_last_iteration_has_no_backward_pass():
    space = Linear(prompts=2, steps=3)
    found = ReNO().run(space, Budget(nfe=14, reward_calls=100))
    for each, ledger in zip(found, space.ledgers, strict=True):
        assert len(each) == 4
        assert each.nfe.tolist() == [3, 6, 9, 12]
        assert each.reward_calls.tolist() == [1, 2, 3, 4]
        assert (ledger.denoiser_evaluations, ledger.backward_passes, ledger.reward_calls) == (12, 9, 4)
    assert len(ReNO().run(space, Budget(reward_calls=2))[0]) == 2
    assert len(ReNO().run(space, Budget(seconds=1e-9))[0]) == 0
    with pytest.raises(ValueError, match="pays for no whole chain"):
        ReNO().run(space, Budget(nfe=2))


def test_checkpointing_computes_again_and_changes_nothing():
    class Counted(Ring):
        calls = 0

        def evaluate(self, rows):
            self.calls += 1
            return super().evaluate(rows)

    calls, results = {}, {}
    for how in ("step", "none"):
        space = Counted(steps=3)
        results[how] = DNO(gradient_checkpointing=how).run(space, Budget(nfe=12))[0].results
        calls[how] = space.calls
        assert space.ledgers[0].denoiser_evaluations == 12  # what is computed again is not counted again
    assert calls == {"none": 12, "step": 12 + 9}
    assert torch.equal(results["none"], results["step"])


def test_the_best_is_kept_and_is_no_view_of_what_moves():
    """A map that gives its noise back, and steps that overshoot: the best is not the last."""

    class Identity(Linear):
        def evaluate(self, rows):
            return rows.x

    found = ReNO(learning_rate=300.0, regulariser_weight=0.0).run(Identity(), Budget(nfe=30))[0]
    assert found.best not in (None, len(found) - 1)
    assert len(found.results.unique(dim=0)) == 30
    again = -0.5 * (found.results - Linear().centre).square().sum(1)
    assert torch.allclose(again, found.rewards)
    assert found.reward == pytest.approx(float(again.max()))


def test_failed_scores_leave_and_the_search_goes_on():
    space = Linear(prompts=4, fails=True)
    found = ReNO().run(space, Budget(nfe=6))
    failures = [ledger.reward_failures for ledger in space.ledgers]
    assert any(failures)
    assert [len(each) for each in found] == [6 - failed for failed in failures]
    assert all(each.results.isfinite().all() for each in found if len(each))


def test_clipping_is_of_each_row_and_drops_what_is_not_finite():
    gradient = torch.tensor([[[3.0, 4.0]], [[0.03, 0.04]], [[math.inf, 1.0]], [[math.nan, 0.0]], [[0.0, 0.0]]])
    clip_rows(gradient, 0.1)
    assert torch.allclose(gradient[:2, 0], torch.tensor([[0.06, 0.08], [0.03, 0.04]]))
    assert not gradient[2:].any()


def test_what_has_no_gradient_is_refused():
    class Blind(Linear):
        differentiable = False

    with pytest.raises(ValueError, match="reno follows the gradient of the reward, which has none"):
        ReNO().run(Blind(), Budget(nfe=2))


@pytest.fixture(scope="module")
def policy():
    return da.Policy.from_pretrained("zoo:shapes-sd")


PROMPTS = ["a red circle", "a blue star left of a green square", "a small yellow star"]
CHAIN = {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 0.0}


def test_reno_raises_the_reward_of_a_pipeline(policy):
    reward = da.rewards.load("shapes-clip")
    search = ReNO(policy, reward, **CHAIN, micro_batch_size=2, gradient_checkpointing="none")
    found = search.search(PROMPTS, nfe=2 * 6)
    for each in found:
        assert each.results.dtype == torch.float32
        assert len(each) == 6
        assert each.reward > float(each.rewards[0]) + 0.02
    pixels = torch.stack([each.best_image for each in found]).float() / 255
    saved = reward(pixels, PROMPTS).value
    assert torch.allclose(saved.double(), torch.tensor([each.reward for each in found]).double(), atol=1e-5)
    ledger = found[0].ledger
    assert (ledger.decodes, ledger.reward_calls, ledger.backward_passes) == (6, 6, 10)


def test_blocks_of_a_pipeline_are_recomputed(policy):
    """The same results, and the denoiser's first block begins again in each backward pass."""
    block, seen, results = policy.denoiser.down_blocks[0].resnets[0], [], {}
    hook = block.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        for how in ("none", "block"):
            seen.clear()
            search = ReNO(policy, da.rewards.load("shapes-clip"), **CHAIN, gradient_checkpointing=how)
            results[how] = (search.search(PROMPTS[0], nfe=4).results, len(seen))
    finally:
        hook.remove()
        policy.set_gradient_checkpointing(False)
    assert results["none"][1] == 4
    assert results["block"][1] == 4 + 2
    assert torch.allclose(results["none"][0], results["block"][0], atol=1e-5)


@pytest.mark.parametrize("build", [tiny_sd_turbo, tiny_sdxl, tiny_schnell, tiny_sd3])
def test_every_kind_of_pipeline_climbs_in_low_precision_with_latents_in_fp32(build):
    chain = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}
    search = ReNO(da.Policy.wrap(build(torch.bfloat16)), redness, **chain)
    for each in search.search(PROMPTS[:2], nfe=5):
        assert each.results.dtype == torch.float32
        assert each.reward > float(each.rewards[0])


def test_dno_climbs_under_guidance_which_costs_two_evaluations_a_step():
    search = DNO(da.Policy.wrap(tiny_sd()), redness, num_inference_steps=3, guidance_scale=3.0, learning_rate=0.1)
    found = search.search(PROMPTS[0], nfe=2 * 3 * 4)
    assert len(found) == 4
    assert float(found.rewards[-1]) > float(found.rewards[0])
    assert (found.ledger.denoiser_evaluations, found.ledger.backward_passes) == (24, 18)


def redness(images, prompts, metadata):
    """What a model with random weights can be asked for."""
    return images[:, 0].mean((1, 2))


def test_a_space_of_tokens_is_refused():
    with pytest.raises(ValueError, match="categorical steps have none"):
        ReNO().check(MaskedSpace.__new__(MaskedSpace))


def energy(images, prompts, metadata):
    """Not linear, so that its gradient depends on where it is taken."""
    return images.square().mean((1, 2, 3))


def test_a_tiny_decoder_gives_its_gradient_and_not_its_pixels(policy, monkeypatch):
    """The reward is that of the pipeline's own pixels; the gradient is that of the tiny decoder at them."""
    space = PolicySpace(policy, energy, ["a red circle"], ChainConfig(**CHAIN))
    latents = torch.zeros(1, *policy.latent_shape())
    own = space.rate(latents, torch.tensor([0]))
    monkeypatch.setattr(policy, "tiny_decoder", torch.nn.Identity(), raising=False)
    upscale = torch.nn.Upsample(scale_factor=policy.pipe.vae_scale_factor)
    monkeypatch.setattr(policy, "_decode_tiny", lambda x: upscale(x[:, :3]))
    latents.requires_grad_()
    value = space.rate(latents, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    assert torch.equal(value.detach(), own)
    assert gradient[:, :3].any()
    assert not gradient[:, 3:].any()
