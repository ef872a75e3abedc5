"""How probable a choice between two samples of one prompt is, given their rewards: three models, all in nats.

An outcome is 1 where the first sample was preferred, -1 where the second was, and 0 where they were called equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_NODES, _REACH = 129, 8.0


def bradley_terry(margin: Tensor, outcome: Tensor) -> Tensor:
    """Log-probability (B,) of decided choices: log sigmoid(r_1 - r_2) where the first was preferred.

    Bradley and Terry (1952), Biometrika 39; for learned rewards Christiano et al. (2017), arXiv:1706.03741,
    equation 1, without their 10 % of random choices.

    Args:
        margin: (B,) r_1 - r_2.
        outcome: (B,) 1 or -1. A 0 says nothing here: its probability is 1/2 whatever the rewards.
    """
    return logsigmoid(margin * outcome)


def rao_kupper(margin: Tensor, outcome: Tensor, threshold: Tensor) -> Tensor:
    """Log-probability (B,) of choices with ties: near-equal samples are called equal.

    Rao and Kupper (1967), doi:10.1080/01621459.1967.10482901; for rewards Liu et al. (2024), arXiv:2410.05328. With
    eta = log theta > 0: P(first) = sigmoid(d - eta), P(second) = sigmoid(-d - eta), and what is left is a tie,
    P(tie) = (exp(2 eta) - 1) P(first) P(second).

    Args:
        margin: (B,) d = r_1 - r_2.
        outcome: (B,) 1, -1 or 0.
        threshold: eta > 0, in nats; log 5 in HPSv3's code.
    """
    first, second = logsigmoid(margin - threshold), logsigmoid(-margin - threshold)
    tie = first + second + torch.expm1(2 * threshold).log()
    return torch.where(outcome > 0, first, torch.where(outcome < 0, second, tie))


def gaussian(margin: Tensor, variance: Tensor, outcome: Tensor) -> Tensor:
    """Log-probability (B,) of decided choices, rewards uncertain: log E sigmoid(z), z ~ N(d, s_1^2 + s_2^2).

    Rewards are independent Gaussians N(mu, s^2), and the choice is Bradley-Terry's between draws of them: HPSv3, Ma et
    al. (2025), arXiv:2508.03789, and PURM, Sun et al. (2025), arXiv:2503.22480. HPSv3's code minimises
    -E log sigmoid(z) over 1,000 draws, an upper bound of the loss here that grows with s (-log sigmoid is convex), and
    so is least without any uncertainty. Here it is the likelihood itself, where a wide s pays if labels contradict the
    means, by the trapezoidal rule: nothing is random, and as the integrand is analytic and ends at 8 standard
    deviations its error is below 1e-9 for a variance up to 40.

    Args:
        margin: (B,) d = mu_1 - mu_2.
        variance: (B,) s_1^2 + s_2^2, above 0.
        outcome: (B,) 1 or -1.
    """
    nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=margin.dtype, device=margin.device)
    log_weights = -nodes.square() / 2
    draws = (margin * outcome)[:, None] + variance.sqrt()[:, None] * nodes
    return torch.logsumexp(logsigmoid(draws) + log_weights, dim=1) - torch.logsumexp(log_weights, dim=0)
