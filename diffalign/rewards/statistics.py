"""Rewards of different scales on one: sums of scores standardised by statistics that were measured beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, Score
from diffalign.rewards.combination import Combination, Rows, check_terms, propagated, weighted_names

_MAD_TO_STD = 1.482602218505602  # 1 / Phi^-1(3/4): of a normal distribution, std / median absolute deviation


@dataclass(frozen=True)
class Statistics:
    """Where a reward's scores lie, in its own units.

    Attributes:
        mean: the centre.
        std: the width, above 0.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean {self.mean} and std {self.std}: both must be finite, and std above 0.")


def measure(scores: Iterable[Score], robust: bool = False) -> dict[str, Statistics]:
    """Centre and width of every part of some scores, such as those of the untrained model's images.

    Args:
        scores: of one reward, one or more batches. Failed samples are left out.
        robust: the median, and 1.4826 times the median absolute deviation from it, which is the standard deviation
            where scores are normal; a few wild ones move neither. Otherwise mean and population standard deviation.

    Returns:
        reward name -> `Statistics`, for every part.

    Raises:
        ValueError: a part has fewer than two valid scores, or they have no width.
    """
    found: dict[str, list[Tensor]] = {}
    for score in scores:
        for name, values in score.parts.items():
            found.setdefault(name, []).append(values.detach().double().cpu())
    return {name: _statistics(name, torch.cat(values), robust) for name, values in found.items()}


def _statistics(name: str, values: Tensor, robust: bool) -> Statistics:
    values = values[values.isfinite()]
    if len(values) < 2:
        raise ValueError(f"reward {name!r} has {len(values)} valid scores: its statistics need at least two.")
    # quantile, not median: torch's median of an even count is the lower of the two in the middle
    centre = values.quantile(0.5) if robust else values.mean()
    deviations = (values - centre).abs()
    width = deviations.quantile(0.5) * _MAD_TO_STD if robust else deviations.square().mean().sqrt()
    if not width > 0:
        most = "more than half of its scores are equal, take robust=False" if robust else "its scores are all equal"
        raise ValueError(f"the scores of reward {name!r} have width 0: {most}.")
    return Statistics(float(centre), float(width))


class StandardisedSum(Combination):
    """sum_k w_k (r_k - mu_k) / sigma_k, with mu_k and sigma_k fixed beforehand.

    Fixed, so that a sample's score depends on itself alone: neither on its batch nor on how far training has come.
    Methods that standardise each reward within its group, such as GDPO (arXiv:2601.05242), do so on ``parts``. One
    term standardises one reward; mu = -1 and sigma = 2 map a cosine to [0, 1]. Its own sigma is
    sqrt(sum_k (w_k s_k / sigma_k)^2), as of independent errors, where every member states its s_k.

    Args:
        terms: (reward, weight) pairs.
        statistics: of each reward, by name; see `measure`.
        name: default: ``z(a) + 0.5*z(b)``.
    """

    def __init__(
        self, terms: Sequence[tuple[Reward, float]], statistics: Mapping[str, Statistics], name: str | None = None
    ) -> None:
        check_terms(terms)
        absent = [reward.name for reward, _ in terms if reward.name not in statistics]
        if absent:
            raise ValueError(f"no statistics of reward {absent[0]!r}: measure its scores; there are {[*statistics]}.")
        super().__init__([reward for reward, _ in terms], name or " + ".join(weighted_names(terms, "z({})")))
        self.weights = [float(weight) for _, weight in terms]
        self.statistics = [statistics[reward.name] for reward, _ in terms]

    def combine(self, rows: Rows) -> Tensor:
        """sum_k w_k (r_k - mu_k) / sigma_k."""
        each = zip(self.weights, self.statistics, rows.values, strict=True)
        return sum(weight * (value - known.mean) / known.std for weight, known, value in each)

    def spread(self, rows: Rows) -> Tensor | None:
        """sqrt(sum_k (w_k s_k / sigma_k)^2)."""
        slopes = [weight / known.std for weight, known in zip(self.weights, self.statistics, strict=True)]
        return propagated(slopes, rows.sigmas)
