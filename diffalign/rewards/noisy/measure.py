"""How often a noise-aware reward ranks pairs right, by noise level."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.noise import normal
from diffalign.rewards.noisy.choices import LEVELS, Choices, margin, noised
from diffalign.rewards.noisy.reward import NoisyReward

SIGMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Noise coefficients that accuracy is told at; of a flow they are t."""


@torch.no_grad()
def ranked_right(
    reward: NoisyReward, choices: Choices, sigma: float, *, seed: int = 0, told: float | None = None, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """How many decided pairs of each prompt are ranked right at the level nearest to `sigma`, by each objective.

    Equal scores are half right: where there is no signal, as at sigma = 1 of a flow, that is a half of all.

    Args:
        reward: what is measured.
        choices: on which.
        sigma: noise coefficient of the level.
        seed: of the noise, one draw a prompt.
        told: sigma of the level that the reward is told, where that is to be a lie; default the true one.
        batch: prompts at once; it changes nothing beyond rounding.

    Returns:
        Pairs ranked right (P, K), and decided pairs (P, K), on the host.
    """
    policy = reward.policy
    schedule = policy.schedule(LEVELS)
    true, said = (int((schedule.sigma - s).abs().argmin()) for s in (sigma, sigma if told is None else told))
    found = []
    for start in range(0, len(choices), batch):
        latents, prompts = choices.latents[start : start + batch], choices.prompts[start : start + batch]
        count, group = latents.shape[:2]
        rows = [(i,) for i in range(start, start + count)]
        noise = normal(latents.shape[2:], seed=seed, purpose="noisy-reward-measure", rows=rows)
        x, _ = noised(reward, latents, schedule.level(true, policy.device).expand(count), noise)
        condition = policy.encode([prompt for prompt in prompts for _ in range(group)])
        scores = reward.scores(x, schedule.level(said, policy.device).expand(len(x)), condition)
        found.append(margin(scores.unflatten(0, (count, group))).cpu())
    ranked, decided = torch.cat(found), choices.outcome.abs() == 1
    right = torch.where(ranked == 0, 0.5, (ranked.sign() == choices.outcome).double())
    return torch.where(decided, right, 0.0).sum(1), decided.sum(1)


def accuracies(reward: NoisyReward, choices: Choices, **how: float) -> Mapping[str, dict[str, float]]:
    """Objective -> sigma -> share of the decided pairs ranked right, at `SIGMAS`; `how` as for `ranked_right`."""
    table: dict[str, dict[str, float]] = {name: {} for name in reward.objectives}
    for sigma in SIGMAS:
        right, decided = ranked_right(reward, choices, sigma, **how)  # type: ignore[arg-type]
        for name, share in zip(reward.objectives, (right.sum(0) / decided.sum(0)).tolist(), strict=True):
            table[name][f"{sigma:g}"] = share
    return table
