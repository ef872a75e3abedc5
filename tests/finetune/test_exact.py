"""Trainers against the optimum of the chain itself, by backward recursion on a Gaussian chain, 3 seeds."""

import pytest
import torch

from diffalign.finetune import DDPO, PRDP, FlowGRPO
from tests.finetune.gaussian import GaussianPolicy, optimum, reward

pytestmark = [pytest.mark.verify, pytest.mark.timeout(600)]

BETA = 1.5
POLICY_GRADIENT = {"kl_weight": BETA, "advantage": "rloo", "clip_range": 0.9, "max_advantage": 1e9}
TRAINERS = {
    "ddpo": (DDPO, "diffusion", POLICY_GRADIENT),
    "ddpo, two epochs": (DDPO, "diffusion", POLICY_GRADIENT | {"num_inner_epochs": 2}),
    "ddpo, score": (DDPO, "diffusion", POLICY_GRADIENT | {"estimator": "score"}),
    "flow_grpo": (FlowGRPO, "flow", POLICY_GRADIENT),
    "prdp": (PRDP, "diffusion", {"beta": BETA, "clip_range": 10.0}),
    "prdp of a flow": (PRDP, "flow", {"beta": BETA, "clip_range": 10.0, "num_inner_epochs": 2}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRAINERS)
def test_within_five_percent_of_the_optimum(name, seed):
    """KL(policy || optimum) over the chain is at most 5 % of KL(base || optimum)."""
    method, kind, settings = TRAINERS[name]
    policy = GaussianPolicy(kind)
    t = method(
        policy,
        reward,
        num_inference_steps=policy.steps,
        guidance_scale=1.0,
        reduction="sum",
        num_prompts_per_step=4,
        group_size=64,
        learning_rate=0.05,
        lr_scheduler="cosine",
        max_train_steps=60,
        max_grad_norm=1e9,
        adam_weight_decay=0.0,
        seed=seed,
        **settings,
    )
    history = t.train(["a"] * 4)
    best, now, std = optimum(policy, t.law(), BETA)
    random = std > 0
    far, near = (((other - best) / std)[random].square().sum() / 2 for other in (torch.zeros_like(best), now))
    print(f"{name}, seed {seed}: {float(near / far):.4f} of {float(far):.3f} nats; reward {history['reward'][-1]:.3f}")
    assert far > 0.05
    assert near < 0.05 * far
