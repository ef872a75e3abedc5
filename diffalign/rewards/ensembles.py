"""Several judges of one thing: their mean, their worst, and what lies between. Members must be on one scale.

Members of different scales are brought to one first: ``Mean([StandardisedSum([(a, 1.0)], measured), ...])``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, as_reward
from diffalign.rewards.combination import Combination, Rows

Members = Sequence[Reward | Callable[..., Any]]


def minimum(*members: Reward | Callable[..., Any]) -> WorstCase:
    """min_k r_k: ``minimum(a, b)`` is ``WorstCase([a, b])``."""
    return WorstCase(members)


def mean(*members: Reward | Callable[..., Any]) -> Mean:
    """The mean of r_k: ``mean(a, b)`` is ``Mean([a, b])``."""
    return Mean(members)


class Mean(Combination):
    """(1/K) sum_k r_k, the mean of an ensemble: Coste et al. (2023), arXiv:2310.02743.

    Its sigma is the population standard deviation of the members: how far the judges disagree.
    """

    def __init__(self, members: Members, name: str | None = None) -> None:
        super().__init__(members, name or call_name("mean", members))

    def combine(self, rows: Rows) -> Tensor:
        """(1/K) sum_k r_k."""
        return _mean(rows.values)

    def spread(self, rows: Rows) -> Tensor:
        """sqrt((1/K) sum_k (r_k - mean)^2)."""
        return _variance(rows.values).sqrt()


class WorstCase(Combination):
    """min_k r_k, worst-case optimisation (WCO): Coste et al. (2023), arXiv:2310.02743.

    The gradient is that of the least member; members that tie for it share it.
    """

    def __init__(self, members: Members, name: str | None = None) -> None:
        super().__init__(members, name or call_name("min", members))

    def combine(self, rows: Rows) -> Tensor:
        """min_k r_k."""
        return rows.values.amin(dim=0)


class UncertaintyWeighted(Combination):
    """mean_k r_k - lambda (1/K) sum_k (r_k - mean)^2, uncertainty-weighted optimisation (UWO).

    Coste et al. (2023), arXiv:2310.02743. The variance is the population's, as in their best-of-n code; their PPO code
    divides by K - 1, which is the same with lambda K / (K - 1). It is in squared units of the reward, so lambda means
    something only beside the members' scale; their scripts default to 0.5 for best-of-n and 0.1 for PPO. A lambda
    so large that 2 lambda (r_k - mean) > 1 rewards a lower r_k.

    Args:
        members: the ensemble.
        penalty: lambda, at least 0; 0 is the mean.
        name: default: made of the members' names.
    """

    def __init__(self, members: Members, penalty: float, name: str | None = None) -> None:
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"penalty is {penalty}: the weight of the variance is a number of at least 0.")
        super().__init__(members, name or call_name("uwo", members, f"{penalty:g}"))
        self.penalty = penalty

    def combine(self, rows: Rows) -> Tensor:
        """mean_k r_k - lambda var_k r_k."""
        return _mean(rows.values) - self.penalty * _variance(rows.values)


class SoftMin(Combination):
    """-beta log((1/K) sum_k exp(-r_k / beta)): between the mean (beta large) and the minimum (beta small).

    The effective reward of a KL-regularised policy that doubts its reward model, with the ensemble as the distribution
    of the reward: Hahami et al. (2026), arXiv:2606.09073, the pessimistic branch. To second order in 1 / beta it is
    mean - variance / (2 beta), the `UncertaintyWeighted` of lambda = 1 / (2 beta); unlike that, it never falls when a
    member rises. The gradient is the softmax of -r_k / beta.

    Args:
        members: the ensemble.
        temperature: beta > 0, in units of the reward.
        name: default: made of the members' names.
    """

    def __init__(self, members: Members, temperature: float, name: str | None = None) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature}: it is a number above 0; for the limit 0 take WorstCase.")
        super().__init__(members, name or call_name("softmin", members, f"{temperature:g}"))
        self.temperature = temperature

    def combine(self, rows: Rows) -> Tensor:
        """-beta log((1/K) sum_k exp(-r_k / beta))."""
        total = reduce(torch.logaddexp, rows.values / -self.temperature)
        return -self.temperature * (total - math.log(len(rows.values)))


class InverseVariance(Combination):
    """sum_k r_k / sigma_k^2 / sum_k 1 / sigma_k^2: each member counts as much as it trusts its own score.

    The estimate of least variance, (sum_k 1 / sigma_k^2)^(-1/2) in sigma, of a quantity that every member measures
    with an independent, unbiased error. The sigmas are those of each member's score, of this very sample, and
    taken as known: no gradient flows through them, or a policy could gain by making its worst judge unsure.

    Raises:
        ValueError: when scoring, where a member states no sigma; it is named.
    """

    def __init__(self, members: Members, name: str | None = None) -> None:
        super().__init__(members, name or call_name("inverse-variance", members))

    def unfit(self, rows: Rows) -> dict[int, str]:
        """Samples of which a member's sigma is not a number above 0."""
        failed: dict[int, str] = {}
        for member, sigma in zip(self.members, rows.sigmas, strict=True):
            if sigma is None:
                raise ValueError(
                    f"{member.name!r} states no sigma, which {self.name!r} weighs it by: take a reward that does, such "
                    "as the Mean of an ensemble, or another combination."
                )
            for i, number in enumerate(sigma.tolist()):
                if not (math.isfinite(number) and number > 0):
                    failed.setdefault(i, f"the sigma of {member.name} is {number}")
        return failed

    def combine(self, rows: Rows) -> Tensor:
        """sum_k r_k / sigma_k^2 / sum_k 1 / sigma_k^2."""
        precisions = [sigma**-2 for sigma in rows.sigmas if sigma is not None]
        return sum(p * value for p, value in zip(precisions, rows.values, strict=True)) / sum(precisions)

    def spread(self, rows: Rows) -> Tensor:
        """(sum_k 1 / sigma_k^2)^(-1/2)."""
        return sum(sigma**-2 for sigma in rows.sigmas if sigma is not None) ** -0.5


def _mean(values: Tensor) -> Tensor:
    """Of (K, N) over K, term by term: the last bits must not depend on N."""
    return sum(values) / len(values)


def _variance(values: Tensor) -> Tensor:
    return _mean((values - _mean(values)) ** 2)


def call_name(function: str, members: Members, *arguments: str) -> str:
    """``function(a, b, arguments)``: the name of a combination that has none."""
    return f"{function}({', '.join([*(as_reward(member).name for member in members), *arguments])})"
