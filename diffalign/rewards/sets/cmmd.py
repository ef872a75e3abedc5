"""CMMD: the Gaussian MMD^2 of CLIP embeddings of Jayasumana et al. (2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.rewards.sets.mmd import MMDReward

BANDWIDTH = 10.0


class CMMDReward(MMDReward):
    """Minus 1000 MMD^2 with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, of features scaled to unit length.

    Jayasumana et al. (2024), arXiv:2401.09603, with the biased estimator of their code; their encoder is CLIP ViT-L/14
    at 336 pixels. Unit vectors are at most 2 apart, so the kernel is nearly linear and the value nearly 10 times the
    squared distance of the two means. In float64, where the published code computes in float32.
    """

    name = "cmmd"
    biased = True
    scale = 1000.0

    def prepare(self, features: Tensor) -> Tensor:
        """Features (n, D) of length one."""
        return torch.nn.functional.normalize(features, dim=1)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """exp(-|x - y|^2 / 200), (n, m), of unit vectors."""
        return ((x @ y.T - 1) / BANDWIDTH**2).exp()

    def diagonal(self, x: Tensor) -> Tensor:
        """One, (n,)."""
        return x.new_ones(len(x))
