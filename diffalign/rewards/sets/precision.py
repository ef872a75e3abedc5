"""Improved precision and recall: samples on the reference's manifold, and the reference on the samples'."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from diffalign.rewards.sets.base import Encoder, SetReward, check_width, exemplar_features
from diffalign.rewards.sets.neighbours import distances, radii


class NeighbourReward(SetReward):
    """A set reward by nearest neighbours. Counts have no gradient.

    Args:
        reference: exemplars' features (M, D), or exemplars that the encoder reads; more than k.
        encoder: see `SetReward`.
        k: the neighbour that a ball reaches to; default: the paper's.
        name: its column in metrics.
    """

    k: int

    def __init__(
        self, reference: Tensor, encoder: Encoder | None = None, k: int | None = None, name: str | None = None
    ) -> None:
        super().__init__(encoder, name)
        self.k = self.k if k is None else k
        if self.k < 1:
            raise ValueError(f"k of {self.name!r} is {self.k}: a ball reaches to the first neighbour at least.")
        self.reference = exemplar_features(reference, encoder, self.name, smallest=self.k + 1)
        self.radius = radii(self.reference, self.k)[:, 0]

    def to(self, device: torch.device | str) -> Self:
        """Moves the reference."""
        self.reference, self.radius = self.reference.to(device), self.radius.to(device)
        return self

    def inside(self, features: Tensor) -> Tensor:
        """(B, M) bool: whether a sample lies in the ball of an exemplar, its boundary included."""
        check_width(features, self.reference, self.name)
        return distances(features, self.reference) <= self.radius


class PrecisionReward(NeighbourReward):
    """The share of samples that lie in the ball of some exemplar; Kynkaanniemi et al. (2019), arXiv:1904.06991.

    Quality, blind to diversity: one good sample repeated has precision 1. k = 3 as in the paper.
    """

    name = "precision"
    k = 3

    def value(self, features: Tensor) -> Tensor:
        """The share, () float64."""
        return self._hits(features).mean()

    def credit(self, features: Tensor) -> Tensor:
        """In closed form, (hit_i - mean) / (B - 1); (B,) float64."""
        hits = self._hits(features)
        return (hits - hits.mean()) / (len(hits) - 1)

    def _hits(self, features: Tensor) -> Tensor:
        return self.inside(features).any(dim=1).to(features.dtype)


class RecallReward(NeighbourReward):
    """The share of exemplars that lie in the ball of some sample; Kynkaanniemi et al. (2019), arXiv:1904.06991.

    Diversity. The balls are of the samples, so an outlier with its large ball can raise it. k = 3 as in the paper.
    """

    name = "recall"
    k = 3

    @property
    def smallest(self) -> int:
        """A ball reaches to the k-th other sample."""
        return self.k + 1

    def value(self, features: Tensor) -> Tensor:
        """The share, () float64."""
        check_width(features, self.reference, self.name)
        covered = distances(self.reference, features) <= radii(features, self.k)[:, 0]
        return covered.any(dim=1).to(features.dtype).mean()

    def credit(self, features: Tensor) -> Tensor:
        """Exact, by counting; (B,) float64.

        Without sample i its own ball is gone, and the balls of those that count it among their k nearest reach to the
        next neighbour. An exemplar stays covered by a ball that covered it before, or by one that has grown.
        """
        check_width(features, self.reference, self.name)
        radius, grown = radii(features, self.k).unbind(dim=1)
        grows = (distances(features, features) <= radius[:, None]).fill_diagonal_(False)  # (j, i): j's ball, without i
        reach = distances(self.reference, features)
        before = reach <= radius
        only_grown = (reach <= grown) & ~before
        kept = before.sum(dim=1, keepdim=True) > before.long()
        gained = only_grown.to(features.dtype) @ grows.to(features.dtype) > 0
        without = (kept | gained).to(features.dtype).mean(dim=0)
        return before.any(dim=1).to(features.dtype).mean() - without
