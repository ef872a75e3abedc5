"""Density and coverage: by the balls of the reference alone, which outliers among the samples cannot swell."""

from __future__ import annotations

from torch import Tensor

from diffalign.rewards.sets.precision import NeighbourReward


class DensityReward(NeighbourReward):
    """How many exemplars' balls a sample lies in, over k, in the mean; Naeem et al. (2020), arXiv:2002.09797.

    1 in the mean for samples of the reference's own distribution, more where they crowd its dense parts. k = 5 as in
    the paper. The ball's boundary counts, where the authors' code leaves it out; that shows on repeated points only.
    """

    name = "density"
    k = 5

    def value(self, features: Tensor) -> Tensor:
        """The mean number of balls over k, () float64."""
        return self._counts(features).mean()

    def credit(self, features: Tensor) -> Tensor:
        """In closed form, (count_i - mean) / (B - 1); (B,) float64."""
        counts = self._counts(features)
        return (counts - counts.mean()) / (len(counts) - 1)

    def _counts(self, features: Tensor) -> Tensor:
        return self.inside(features).sum(dim=1).to(features.dtype) / self.k


class CoverageReward(NeighbourReward):
    """The share of exemplars with a sample in their ball; Naeem et al. (2020), arXiv:2002.09797.

    A sample earns credit for the exemplars that it alone covers. k = 5 as in the paper; boundaries as in density.
    """

    name = "coverage"
    k = 5

    def value(self, features: Tensor) -> Tensor:
        """The share, () float64."""
        return self.inside(features).any(dim=0).to(features.dtype).mean()

    def credit(self, features: Tensor) -> Tensor:
        """The share of exemplars that no other sample covers; (B,) float64."""
        inside = self.inside(features)
        return (inside & (inside.sum(dim=0) == 1)).to(features.dtype).mean(dim=1)
