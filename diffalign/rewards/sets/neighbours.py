"""Balls around the points of a set that reach to the k-th neighbour: the manifold estimate of the k-NN metrics."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**24  # distances in memory at once: 128 MiB


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean (n, m), summed difference by difference: equal points are at zero, no pair depends on the others."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def radii(points: Tensor, k: int) -> Tensor:
    """(n, 2): the distances from each point to its k-th and its (k + 1)-th neighbour among the others.

    The second is infinite where there are only k others.
    """
    found, step = [], max(1, _BLOCK // len(points))
    for start in range(0, len(points), step):
        block = distances(points[start : start + step], points)
        block.diagonal(start).fill_(torch.inf)
        nearest = block.topk(min(k + 1, len(points)), dim=1, largest=False).values
        found.append(nearest[:, k - 1 : k + 1])
    return torch.cat(found)
