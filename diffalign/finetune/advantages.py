r"""Advantages: what the rewards of one step say about each sample, before any loss sees them.

Groups are the samples of one prompt. With r_i the reward of sample i of G in its group, mean and std (population) over
the group,

    group:       A_i = (r_i - mean) / std            Flow-GRPO, DanceGRPO (Shao et al. 2024, arXiv 2402.03300)
    group_mean:  A_i = r_i - mean                    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)
    rloo:        A_i = r_i - mean of the others      RLOO (Ahmadian et al. 2024, arXiv 2402.14740)
    rank:        A_i = 2 (rank of r_i - 1) / (G - 1) - 1, equal rewards sharing their mean rank
    global_std:  A_i = (r_i - mean) / std over all samples of the step      Flow-GRPO, `global_std`
    batch:       A_i = (r_i - mean) / std, both over all samples of the step
    history:     A_i = (r_i - mean) / std over the last rewards of the prompt, as in DDPO: see `PromptHistory`

A failed score is NaN: it has no part in any statistic, and its advantage is NaN, which methods take for 0. In a group
without spread it is 0 exactly, not a rounding error divided by a small number.

`rank` is pairwise: with w_i the share of the others that a sample beats, ties counting half, it is 2 w_i - 1.

Beside a divergence from the reference `rloo` alone is to scale. The mean of `group_mean` and its like has the sample
itself in it, which makes the gradient of the reward (G - 1) / G of what it is: the divergence weighs G / (G - 1) more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.rewards import infinite_where_rounding


def _mean_std(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of the rows of (P, G), over what is not NaN; (P, 1) each."""
    mean = rewards.nanmean(1, keepdim=True)
    std = (rewards - mean).square().nanmean(1, keepdim=True).sqrt()
    return mean, infinite_where_rounding(std, rewards)


def group(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G); see the file."""
    mean, std = _mean_std(rewards)
    return (rewards - mean) / std


def group_mean(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G); see the file."""
    return rewards - rewards.nanmean(1, keepdim=True)


def rloo(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G); see the file. A sample without others has none to be compared with: 0."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    return group_mean(rewards) * count / (count - 1).clamp(min=1)


def rank(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G) in [-1, 1]; see the file."""
    below = (rewards[:, None, :] < rewards[:, :, None]).sum(2)
    above = (rewards[:, None, :] > rewards[:, :, None]).sum(2)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    shares = (below - above).to(rewards) / (count - 1).clamp(min=1)
    return shares.masked_fill(rewards.isnan(), torch.nan)


def global_std(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G); see the file."""
    _, std = _mean_std(rewards.reshape(1, -1))
    return group_mean(rewards) / std


def batch(rewards: Tensor) -> Tensor:
    """(P, G) -> (P, G); see the file."""
    return group(rewards.reshape(1, -1)).reshape(rewards.shape)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    each.__name__: each for each in (group, group_mean, rloo, rank, global_std, batch)
}


class PromptHistory:
    """Mean and spread of the last rewards of each prompt, DDPO's per-prompt tracker (Black et al. 2023, app. D).

    A prompt with fewer than `least` rewards so far is measured by all samples of the step instead. Departure: rewards
    of a step count in their own statistic for all prompts alike, whatever their order.

    Args:
        size: rewards of a prompt that are remembered.
        least: rewards from which on a prompt has its own statistic.
    """

    def __init__(self, size: int = 32, least: int = 16) -> None:
        self.size, self.least = size, least
        self.rewards: dict[int | str, list[float]] = {}

    def __call__(self, rewards: Tensor, ids: Sequence[int | str]) -> Tensor:
        """Remember the rewards (P, G) of P prompts, and return their advantages (P, G)."""
        for name, row in zip(ids, rewards.tolist(), strict=True):
            kept = self.rewards.get(name, []) + [value for value in row if value == value]
            self.rewards[name] = kept[-self.size :]
        of_step = _mean_std(rewards.reshape(1, -1))
        rows = []
        for name, row in zip(ids, rewards, strict=True):
            past = torch.tensor([self.rewards[name]], dtype=rewards.dtype)
            mean, std = _mean_std(past) if past.numel() >= self.least else of_step
            rows.append((row - mean[0]) / std[0])
        return torch.stack(rows)
