"""Guidance in an interval of the steps: against diffusers' own sampler, whose callback ends its guidance."""

import pytest
import torch

from diffalign.laws import DDIM, FlowODE, FlowSDE
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux
from diffalign.rollout import LastK, differentiable_rollout, in_interval, log_probs, rollout, trajectory_gradient

PROMPTS = ["a bad dog", "a fine lake"]
ROWS = [(0, 0), (1, 0)]
STEPS = 5


def test_the_interval_is_that_of_diffusers_guiders():
    assert in_interval(3.0, 10) == 3.0
    assert in_interval(3.0, 5, (0.2, 0.8)) == [1.0, 3.0, 3.0, 3.0, 1.0]
    assert in_interval(3.0, 10, (0.0, 0.35)) == [3.0] * 3 + [1.0] * 7
    with pytest.raises(ValueError, match=r"guidance_interval \[0.5, 0.55\] holds none of 10 steps"):
        in_interval(3.0, 10, (0.5, 0.55))


@pytest.mark.parametrize(("tiny", "law"), [(tiny_sd, DDIM(0.0)), (tiny_sd3, FlowODE())])
def test_guidance_that_ends_equals_diffusers_whose_callback_ends_it(tiny, law):
    policy = Policy.wrap(tiny())
    height, width = (side * 8 for side in (4, 4))
    run = rollout(
        policy,
        policy.encode(PROMPTS),
        law,
        policy.schedule(STEPS),
        rows=ROWS,
        seed=0,
        guidance_scale=in_interval(4.0, STEPS, (0.0, 0.6)),
        record_states=True,
        height=height,
        width=width,
    )
    assert run.ledger.denoiser_evaluations == 2 * (3 * 2 + 2 * 1)

    def end(pipe, step, timestep, given):
        if step == 2:
            pipe._guidance_scale = 1.0
            given = {name: value.chunk(2)[1] if name != "latents" else value for name, value in given.items()}
        return given

    pooled = ["pooled_prompt_embeds"] if tiny is tiny_sd3 else []
    theirs = policy.pipe(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=run.states[0],
        output_type="latent",
        callback_on_step_end=end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", *pooled],
    ).images
    torch.testing.assert_close(run.latents, theirs, rtol=1e-4, atol=1e-5)


def test_steps_outside_have_no_gradient_of_an_unconditional_branch():
    policy = Policy.wrap(tiny_sd(torch.float64))
    policy.add_lora(rank=2, alpha=2)
    given = {"rows": ROWS, "seed": 0, "plan": LastK(2).plan(4, None)}
    run = differentiable_rollout(
        policy, policy.encode(PROMPTS), DDIM(0.0), policy.schedule(4), guidance_scale=[3.0, 3.0, 3.0, 1.0], **given
    )
    assert run.ledger.denoiser_evaluations == 2 * 7
    assert run.ledger.backward_passes == 2 * 3


def test_densities_and_the_two_pass_gradient_follow_the_interval():
    policy = Policy.wrap(tiny_sd3(torch.float64))
    policy.add_lora(rank=2, alpha=2, seed=1)
    parameters = list(policy.trainable().values())
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    condition, law, schedule = policy.encode(PROMPTS), FlowSDE(), policy.schedule(4)
    scale = [1.0, 3.0, 3.0, 1.0]
    recorded = rollout(
        policy,
        condition,
        law,
        schedule,
        rows=ROWS,
        seed=0,
        guidance_scale=scale,
        record_states=True,
        record_log_probs="mean",
    )
    chain = (policy, recorded, condition, law, schedule)
    now = log_probs(*chain, guidance_scale=scale, reduction="mean")
    assert torch.equal(now.detach(), recorded.log_probs[:, recorded.stochastic])
    torch.testing.assert_close(
        torch.autograd.grad(now.square().sum(), parameters),
        _gradient(parameters, *chain, guidance_scale=scale),
        rtol=1e-9,
        atol=1e-12,
    )


def _gradient(parameters, *chain, guidance_scale):
    _, cost = trajectory_gradient(
        *chain, lambda L: L.square().sum(), guidance_scale=guidance_scale, reduction="mean", micro_batch_size=2
    )
    pairs = int(chain[1].stochastic.sum()) * 2
    assert cost.backward_passes < 2 * pairs
    return tuple(p.grad for p in parameters)


def test_what_cannot_be_guided_step_by_step_is_refused():
    policy = Policy.wrap(tiny_flux())
    chain = (policy, policy.encode(PROMPTS), FlowODE(), policy.schedule(3))
    with pytest.raises(ValueError, match="FluxPipeline reads or ignores its guidance scale"):
        rollout(*chain, rows=ROWS, seed=0, guidance_scale=[1.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="2 guidance scales for 3 steps"):
        rollout(*chain, rows=ROWS, seed=0, guidance_scale=[3.0, 3.0])
