"""Rollouts: exact ratios, addressed noise, recorded tensors and counted cost."""

import math

import pytest
import torch

from diffalign.laws import DDIM, FlowSDE, Law
from diffalign.noise import generator
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import (
    Full,
    LastK,
    LowVariance,
    Plan,
    Sparse,
    Trajectory,
    differentiable_rollout,
    log_probs,
    rollout,
    transition,
)

PROMPTS = ["a bad dog", "a fine lake", "a bad dog"]
ROWS = [(0, 0), (1, 0), (2, 0)]
CHAIN = {"rows": ROWS, "seed": 0, "guidance_scale": 3.0}


def policy_and_law(family: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, Law]:
    if family == "sd":
        policy, law = Policy.wrap(tiny_sd(dtype, prediction_type="v_prediction")), DDIM(1.0)
    else:
        policy, law = Policy.wrap(tiny_sd3(dtype)), FlowSDE()
    policy.add_lora(rank=2, alpha=2)
    return policy, law


def recorded(policy: Policy, law: Law, **settings) -> tuple[Trajectory, tuple]:
    condition, schedule = policy.encode(PROMPTS), policy.schedule(3)
    settings = {"record_states": True, "record_log_probs": "sum", "record_transitions": True} | settings
    return rollout(policy, condition, law, schedule, **CHAIN, **settings), (condition, law, schedule)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_ratio_is_exactly_one_until_the_weights_move(family: str, dtype: torch.dtype, micro_batch_size) -> None:
    """Evaluated with gradients, as training does; the adapter is on, and its B is 0 until it moves."""
    policy, law = policy_and_law(family, dtype)
    trajectory, chain = recorded(policy, law, micro_batch_size=micro_batch_size)
    assert all(state.dtype == torch.float32 for state in trajectory.states)
    settings = {"guidance_scale": 3.0, "micro_batch_size": micro_batch_size}
    steps = trajectory.stochastic.nonzero().flatten().tolist()
    assert steps
    now = log_probs(policy, trajectory, *chain, reduction="sum", **settings)
    assert now.requires_grad
    assert torch.equal((now - trajectory.log_probs[:, steps]).exp(), torch.ones(3, len(steps)))
    again = transition(policy, trajectory, *chain, steps[0], **settings)
    old, x = trajectory.transitions[steps[0]], trajectory.states[steps[0] + 1]
    assert torch.equal(again.log_ratio(x, old, "mean"), torch.zeros(3))
    for parameter in policy.trainable().values():
        parameter.data.add_(0.05)
    moved = transition(policy, trajectory, *chain, steps[0], **settings)
    assert (moved.log_ratio(x, old, "sum").abs() > 1e-4).all()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_another_layout_moves_the_ratio_by_rounding_only(family: str) -> None:
    policy, law = policy_and_law(family)
    trajectory, chain = recorded(policy, law)
    now = log_probs(policy, trajectory, *chain, guidance_scale=3.0, reduction="sum", micro_batch_size=1)
    steps = trajectory.stochastic.nonzero().flatten()
    assert (now - trajectory.log_probs[:, steps]).abs().max() < 2e-3, "nats, over 256 elements"


def test_log_probs_are_those_of_the_recorded_gaussians() -> None:
    policy, law = policy_and_law("sd3")
    trajectory, chain = recorded(policy, law, record_log_probs="mean")
    stds = law.stds(chain[2])
    for i, step in enumerate(trajectory.transitions):
        z = (trajectory.states[i + 1] - step.mean).double() / stds[i]
        expected = (-0.5 * z**2 - stds[i].log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
        torch.testing.assert_close(trajectory.log_probs[:, i].double(), expected, rtol=1e-5, atol=1e-5)
        assert abs(z.std() - 1) < 0.1


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_images_do_not_depend_on_the_batch_they_were_drawn_in(family: str) -> None:
    policy, law = policy_and_law(family)
    whole, (condition, _, schedule) = recorded(policy, law)
    parts, _ = recorded(policy, law, micro_batch_size=2)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-5, atol=2e-3)
    assert parts.ledger == whole.ledger
    alone = rollout(policy, condition.rows([1]), law, schedule, **(CHAIN | {"rows": [ROWS[1]]})).latents
    torch.testing.assert_close(alone, whole.latents[1:2], rtol=0, atol=2e-5)
    # The same prompt under another id is another image.
    assert (whole.latents[0] - whole.latents[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_differentiable_rollout_is_the_same_sample(family: str) -> None:
    policy, law = policy_and_law(family)
    trajectory, (condition, _, schedule) = recorded(policy, law, record_states=False)
    assert trajectory.states is None
    graded = differentiable_rollout(policy, condition, law, schedule, plan=Plan((1, 2)), **CHAIN)
    assert torch.equal(graded.latents, trajectory.latents)
    early = differentiable_rollout(policy, condition, law, schedule, plan=Plan((0,), True, stop=1), **CHAIN)
    assert (early.latents - trajectory.latents).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_renoised_predictions_follow_the_first_and_differ_by_their_noise(family: str) -> None:
    policy, law = policy_and_law(family)
    condition, schedule = policy.encode(PROMPTS), policy.schedule(3)
    first = differentiable_rollout(policy, condition, law, schedule, plan=Plan((1,), stop=1), **CHAIN).latents
    plan = Plan((1,), stop=1, renoised=2)
    run = differentiable_rollout(policy, condition, law, schedule, plan=plan, **CHAIN)
    base, one, two = run.latents.split(3)
    assert torch.equal(base, first)
    assert min((a - b).abs().amax((1, 2, 3)).min() for a, b in [(base, one), (base, two), (one, two)]) > 1e-3
    alone = CHAIN | {"rows": [ROWS[1]]}
    row = differentiable_rollout(policy, condition.rows([1]), law, schedule, plan=plan, **alone).latents
    torch.testing.assert_close(row, run.latents[1::3], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_memory_of_sparse_steps_does_not_grow_with_the_others(family: str) -> None:
    """What the graph holds of k = 2 evaluations among 3 and among 9 steps: the rest adds coefficients only."""
    policy, law = policy_and_law(family)
    condition, held = policy.encode(PROMPTS), {}
    for steps in (3, 9):
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if tensor.grad_fn is not None or tensor.numel() > len(ROWS):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            plan = Plan((0, 2), detach_input=True)
            run = differentiable_rollout(
                policy, condition, law, policy.schedule(steps), plan=plan, checkpoint=False, **CHAIN
            )
        held[steps] = sum(saved.values())
        del run
    assert held[3] == held[9] > 100_000


def test_cost_is_counted() -> None:
    policy, law = policy_and_law("sd3")
    trajectory, (condition, _, schedule) = recorded(policy, law)
    assert trajectory.ledger.denoiser_evaluations == 3 * 3 * 2
    settings = CHAIN | {"guidance_scale": 1.0}
    assert rollout(policy, condition, law, schedule, **settings).ledger.denoiser_evaluations == 3 * 3
    run = differentiable_rollout(policy, condition, law, schedule, plan=Plan((0, 1)), reference=True, **CHAIN)
    assert run.ledger.denoiser_evaluations == 3 * 2 * (3 + 2)
    assert run.ledger.backward_passes == 3 * 2 * 2
    sparse = Sparse(2).plan(3, generator(0, "truncation", 0))
    run = differentiable_rollout(policy, condition, law, schedule, plan=sparse, **CHAIN)
    assert (run.ledger.denoiser_evaluations, run.ledger.backward_passes) == (3 * 2 * 3, 3 * 2 * 2)
    again = LowVariance(2, skip=1).plan(3, generator(0, "truncation", 0))
    run = differentiable_rollout(policy, condition, law, schedule, plan=again, **CHAIN)
    assert (run.ledger.denoiser_evaluations, run.ledger.backward_passes) == (3 * 2 * (2 + 2), 3 * 2 * 3)
    run = differentiable_rollout(policy, condition, law, schedule, plan=again, reference=True, **CHAIN)
    assert run.ledger.denoiser_evaluations == 3 * 2 * (2 + 2 + 3)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_steps_without_gradient_are_evaluated_without_a_graph(family: str) -> None:
    """One evaluation a step, twice those with gradient when checkpointed, and no text encoder in the loop."""
    policy, law = policy_and_law(family)
    condition, schedule = policy.encode(PROMPTS), policy.schedule(3)
    policy.encode([""])
    modes: list[bool] = []
    handle = policy.denoiser.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    texts: list[int] = []
    policy.pipe.text_encoder.register_forward_pre_hook(lambda *_: texts.append(1))
    plan = LastK(1).plan(3, None)  # type: ignore[arg-type]
    run = differentiable_rollout(policy, condition, law, schedule, plan=plan, **CHAIN)
    assert modes == [False, False, True]
    run.latents.sum().backward()
    assert modes == [False, False, True, True]
    assert all(p.grad is not None for n, p in policy.trainable().items() if "lora_B" in n)
    assert not texts
    handle.remove()


def test_what_makes_no_sense_is_refused_in_words() -> None:
    policy, law = policy_and_law("sd")
    trajectory, chain = recorded(policy, law, record_states=False)
    settings = {"guidance_scale": 3.0, "reduction": "sum"}
    with pytest.raises(ValueError, match="holds no states: record it with record_states=True"):
        log_probs(policy, trajectory, *chain, **settings)
    silent, chain = recorded(policy, DDIM(0.0))
    with pytest.raises(ValueError, match="steps of this law are deterministic"):
        log_probs(policy, silent, *chain, **settings)
    with pytest.raises(ValueError, match=r"steps \[1\] are deterministic"):
        log_probs(policy, silent, *chain, steps=[1], **settings)
    with pytest.raises(ValueError, match="2 noise addresses for 3 conditions"):
        rollout(policy, *chain, **(CHAIN | {"rows": ROWS[:2]}))
    plan = Full().plan(3, None)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are disabled"):
        differentiable_rollout(policy, *chain, plan=plan, **CHAIN)
    bare = Policy.wrap(tiny_sd())
    with pytest.raises(ValueError, match=r"no trainable parameter: call policy.add_lora"):
        differentiable_rollout(bare, *chain, plan=plan, **CHAIN)
