"""KID: the unbiased polynomial MMD^2 of Binkowski et al. (2018)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.sets.mmd import MMDReward


class KIDReward(MMDReward):
    """Minus the kernel distance with k(x, y) = (x.y / D + 1)^3; Binkowski et al. (2018), arXiv:1801.01401.

    All pairs are used, so the value depends on no draw and on no order of the samples. Published figures are means
    over random subsets, an estimate of the same number with more noise: see `kid_of_subsets`. They are often given
    times 1000. The paper's encoder is Inception's last pooling, D = 2048.
    """

    name = "kid"
    biased = False
    smallest = 2

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """(x.y / D + 1)^3, (n, m)."""
        return (x @ y.T / x.shape[1] + 1) ** 3

    def diagonal(self, x: Tensor) -> Tensor:
        """(|x|^2 / D + 1)^3, (n,)."""
        return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3


def kid_of_subsets(
    features: Tensor, reference: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID as it is reported: mean and standard deviation of the distance over random subsets of both sides.

    The subsets are those of torch-fidelity for the same seed: without replacement, the samples' first, by NumPy's
    ``RandomState``, whose numbers are frozen. The deviation divides by the number of subsets.

    Args:
        features: (n, D) of the samples.
        reference: (m, D) of the exemplars.
        subsets: how many.
        size: samples, and exemplars, in each.
        seed: of the draw.
    """
    if size > min(len(features), len(reference)):
        raise ValueError(
            f"subsets of {size} cannot be drawn from {len(features)} samples and {len(reference)} exemplars: lower it."
        )
    draw = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x, y = (side[torch.from_numpy(draw.choice(len(side), size, replace=False))] for side in (features, reference))
        distances.append(-KIDReward(y).value(x.detach().double()))
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))
