"""Arithmetic of importance weights, in the log domain and on the host in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(values: Tensor, dim: int = -1) -> Tensor:
    """Log of the mean of exp(values)."""
    return values.logsumexp(dim) - math.log(values.shape[dim])


def normalised(log_weights: Tensor) -> Tensor:
    """Weights (..., K) of sum 1; uniform where every weight is zero."""
    dead = (log_weights == -math.inf).all(-1, keepdim=True)
    return log_weights.masked_fill(dead, 0.0).softmax(-1)


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 of weights (..., K); between 1 and K (Kong 1992)."""
    return 1 / normalised(log_weights).square().sum(-1)


def systematic(log_weights: Tensor, count: int, uniform: float) -> Tensor:
    """Systematic resampling: index k of weights (K,) is drawn floor or ceil of count w_k times, (count,) ascending.

    One uniform number for all draws (Carpenter, Clifford & Fearnhead 1999); unbiased, and its variance is below that
    of multinomial draws in practice.

    Args:
        log_weights: (K,), not normalised.
        count: how many to draw.
        uniform: in [0, 1).
    """
    cumulative = normalised(log_weights.double()).cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + uniform) / count * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=len(log_weights) - 1)
