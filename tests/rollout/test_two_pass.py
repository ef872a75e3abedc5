"""The two-pass gradient of a whole trajectory against the full graph, in float64 on tiny real models."""

import pytest
import torch
from torch import Tensor

from diffalign.laws import DDIM, FlowSDE, Window
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import log_probs, rollout, trajectory_gradient, transition

PROMPTS = ["a bad dog", "a fine lake", "a bad dog", "a fine lake"]
ROWS = [(i,) for i in range(4)]
GUIDANCE = 2.0


@pytest.fixture(params=["sd", "sd3"])
def run(request):
    """(policy, trajectory, condition, law, schedule), the weights moved since the rollout, as in an inner epoch."""
    if request.param == "sd":
        policy, law = Policy.wrap(tiny_sd(torch.float64, prediction_type="v_prediction")), DDIM(0.7)
    else:
        policy, law = Policy.wrap(tiny_sd3(torch.float64)), FlowSDE()
    policy.add_lora(rank=2, alpha=4)
    condition, schedule = policy.encode(PROMPTS), policy.schedule(4)
    trajectory = rollout(
        policy, condition, law, schedule, rows=ROWS, seed=5, guidance_scale=GUIDANCE,
        record_states=True, record_log_probs="mean",
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    return policy, trajectory, condition, law, schedule


def prdp(old: Tensor):
    """The square of two trajectories' difference in log-ratio against that in reward: every step meets every other."""
    reward = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64)

    def loss(now: Tensor) -> Tensor:
        ratio = (now - old[:, : now.shape[1]]).sum(1)
        return ((reward[:, None] - reward) - 0.5 * (ratio[:, None] - ratio)).square().mean()

    return loss


def gradients(policy: Policy) -> list[Tensor]:
    found = [p.grad.clone() for p in policy.trainable().values()]
    for parameter in policy.trainable().values():
        parameter.grad = None
    return found


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Of two gradients, relative to the second's size."""
    difference = torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)])
    return float(difference.norm() / torch.cat([y.flatten() for y in b]).norm())


@pytest.mark.parametrize("guidance", ["pipeline", "detach_unconditional"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_it_equals_the_full_graph(run, guidance: str, micro_batch_size) -> None:
    policy, trajectory, *chain = run
    loss = prdp(trajectory.log_probs)
    settings = {"guidance_scale": GUIDANCE, "reduction": "mean", "guidance": guidance}
    whole = loss(log_probs(policy, trajectory, *chain, **settings))
    whole.backward()
    expected = gradients(policy)
    value, cost = trajectory_gradient(policy, trajectory, *chain, loss, micro_batch_size=micro_batch_size, **settings)
    assert distance(gradients(policy), expected) < 1e-10
    torch.testing.assert_close(value, whole.detach(), rtol=1e-12, atol=0)
    assert not value.requires_grad
    pairs = trajectory.log_probs.ne(0).sum()
    assert cost.denoiser_evaluations == 2 * 2 * pairs
    assert cost.backward_passes == pairs * (1 if guidance == "detach_unconditional" else 2)


def test_what_the_loss_is_flat_in_is_not_evaluated_again(run) -> None:
    policy, trajectory, *chain = run
    settings = {"guidance_scale": GUIDANCE, "reduction": "mean", "steps": [0, 2]}

    def clipped(now: Tensor) -> Tensor:
        return torch.where(torch.arange(4)[:, None] == 1, now, now.detach()).square().sum()

    _, cost = trajectory_gradient(policy, trajectory, *chain, clipped, **settings)
    found = gradients(policy)
    clipped(log_probs(policy, trajectory, *chain, **settings)).backward()
    assert distance(found, gradients(policy)) < 1e-10
    assert (cost.denoiser_evaluations, cost.backward_passes) == (2 * (8 + 2), 2 * 2)

    _, cost = trajectory_gradient(policy, trajectory, *chain, lambda now: 0 * now.sum(), **settings)
    assert cost.backward_passes == 0
    assert all(p.grad is None for p in policy.trainable().values())


def test_deterministic_steps_are_refused_and_left_out_by_default() -> None:
    policy = Policy.wrap(tiny_sd3(torch.float64))
    policy.add_lora(rank=2, alpha=4)
    schedule, condition = policy.schedule(4), policy.encode(PROMPTS)
    law = Window(FlowSDE(), schedule, 1, 3)
    trajectory = rollout(
        policy, condition, law, schedule, rows=ROWS, seed=5, guidance_scale=GUIDANCE, record_states=True
    )
    chain = (policy, trajectory, condition, law, schedule)
    settings = {"guidance_scale": GUIDANCE, "reduction": "sum"}
    _, cost = trajectory_gradient(*chain, lambda now: now.sum(), **settings)
    assert cost.backward_passes == 2 * 4 * 2
    with pytest.raises(ValueError, match=r"steps \[0\] are deterministic"):
        trajectory_gradient(*chain, lambda now: now.sum(), steps=[0, 1], **settings)


def test_a_known_first_pass_is_left_out(run):
    """L as log-ratios to other Gaussians, known or evaluated: the same loss and gradient, a pass less."""
    policy, trajectory, condition, law, schedule = run
    chain = {"guidance_scale": GUIDANCE, "reduction": "sum", "steps": [0, 1, 2]}
    with torch.no_grad(), policy.reference():
        against = {
            i: transition(policy, trajectory, condition, law, schedule, i, guidance_scale=GUIDANCE) for i in (0, 1, 2)
        }
    with torch.no_grad():
        known = log_probs(policy, trajectory, condition, law, schedule, against=against, **chain)
        plain = log_probs(policy, trajectory, condition, law, schedule, **chain)
        with policy.reference():
            base = log_probs(policy, trajectory, condition, law, schedule, **chain)
    torch.testing.assert_close(known, plain - base, rtol=1e-9, atol=1e-9)
    found = []
    for given in (None, known):
        value, ledger = trajectory_gradient(
            policy,
            trajectory,
            condition,
            law,
            schedule,
            prdp(trajectory.log_probs),
            against=against,
            known=given,
            **chain,
        )
        found.append((float(value), gradients(policy), ledger.denoiser_evaluations))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert distance(found[1][1], found[0][1]) < 1e-12
    assert found[0][2] - found[1][2] == 4 * 3 * 2
