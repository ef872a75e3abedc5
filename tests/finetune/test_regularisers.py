"""What any method may be held by: divergences of a step and the distance of the weights."""

import math

import pytest
import torch

from diffalign.finetune import DDPO, RWR, FlowGRPO
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from tests.finetune.tiny_training import perturb


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def policy_off_its_base(make):
    policy = Policy.wrap(make())
    policy.add_lora(rank=2, alpha=6)
    perturb(policy)
    return policy


def test_divergences_of_a_step():
    """One sample, which nothing is compared with, and one step: the loss is what holds it, chi^2 = exp(2 KL) - 1."""
    t = FlowGRPO(
        policy_off_its_base(tiny_sd3), redness,
        num_inference_steps=4, num_prompts_per_step=1, advantage="batch", window=1, kl_weight=0.25, chi2_weight=0.5,
    )  # fmt: skip
    row = t.train(["a red circle"], steps=1).rows[0]
    assert row["kl"] > 1e-4
    assert row["chi2"] == pytest.approx(math.expm1(2 * row["kl"]), rel=1e-5)
    assert row["loss"] == pytest.approx(0.25 * row["kl"] + 0.5 * row["chi2"], rel=1e-6)
    assert row["grad_norm"] > 0
    assert row["nfe"] == 2 * (4 + 2)
    without = DDPO(policy_off_its_base(tiny_sd), redness, num_inference_steps=4, num_prompts_per_step=1)
    assert not {"kl", "chi2"} & without.train(["a red circle"], steps=1).rows[0].keys()
    with pytest.raises(ValueError, match="trains one of 4 steps, and what later ones diverge is then unknown"):
        DDPO(Policy.wrap(tiny_sd()), redness, num_inference_steps=4, timestep_fraction=0.25, kl_weight=0.25)


def test_the_distance_of_the_weights():
    """By the weights of the fused pipeline, and its gradient in a step whose loss has none."""
    policy = policy_off_its_base(tiny_sd3)
    base = {name: p.clone() for name, p in policy.denoiser.named_parameters()}
    found = policy.squared_update()
    expected = torch.autograd.grad(found, list(policy.trainable().values()))
    t = RWR(
        policy, lambda images, prompts, metadata: images[:, 0, 0, 0] * math.nan,
        num_inference_steps=2, num_prompts_per_step=2, group_size=2, temperature=1.0, weight_l2=3.0, max_grad_norm=1e9,
    )  # fmt: skip
    t.optimizer.zero_grad()
    assert t._penalise() == {"weight_l2": pytest.approx(float(found.detach()))}
    for p, gradient in zip(policy.trainable().values(), expected, strict=True):
        torch.testing.assert_close(p.grad, 3 * gradient)
    policy.pipe.fuse_lora()
    moved = policy.denoiser.named_parameters()
    total = sum(float((p - base[name]).double().square().sum()) for name, p in moved if "lora" not in name)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)
    assert total > 0


def test_the_distance_is_in_the_row_and_smaller_for_its_weight():
    rows = []
    for weight in (0.0, 10.0):
        t = RWR(
            policy_off_its_base(tiny_sd3), redness,
            num_inference_steps=2, num_prompts_per_step=1, group_size=2, temperature=1.0, weight_l2=weight,
        )  # fmt: skip
        rows.append(t.train(["a red circle"], steps=5).rows)
        rows[-1].append(float(t.policy.squared_update().detach()))
    assert "weight_l2" not in rows[0][0]
    assert rows[1][0]["weight_l2"] > rows[1][-2]["weight_l2"] > rows[1][-1]
    assert rows[1][-1] < 0.98 * rows[0][-1]
