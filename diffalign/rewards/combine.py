"""Rewards that must be good together: weighted harmonic mean, hinge and gate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.combination import Combination, Rows, check_terms, weighted_names

_EPSILON = 1e-8


class Harmonic(Combination):
    """sum_k w_k / sum_k (w_k / (r_k + 1e-8)), the weighted harmonic mean: near 0 where any member is near 0.

    With two members, a subject's similarity and a prompt's, and weights lambda and 1 - lambda, it is the
    lambda-harmonic reward of RPO (Miao et al. 2024, arXiv:2407.12164), the 1e-8 as in its code (lambda = 0.3 there).
    RPO maps cosines to [0, 1] by (1 + c) / 2 first: a `StandardisedSum` with mean -1 and std 2. A sample with a
    member below 0 fails, as it has no harmonic mean.

    Args:
        terms: (reward, weight) pairs, weights above 0.
        name: default: made of the members' names.
    """

    def __init__(self, terms: Sequence[tuple[Reward, float]], name: str | None = None) -> None:
        check_terms(terms, positive=True)
        super().__init__([reward for reward, _ in terms], name or f"harmonic({', '.join(weighted_names(terms))})")
        self.weights = [float(weight) for _, weight in terms]

    def unfit(self, rows: Rows) -> dict[int, str]:
        """Samples with a member below 0."""
        failed: dict[int, str] = {}
        for member, values in zip(self.members, rows.values.tolist(), strict=True):
            for i, value in enumerate(values):
                if value < 0:
                    reason = f"{member.name} is {value:g}, and a harmonic mean takes scores of at least 0"
                    failed.setdefault(i, f"{reason}; (1 + c) / 2 maps a cosine there")
        return failed

    def combine(self, rows: Rows) -> Tensor:
        """sum_k w_k / sum_k (w_k / (r_k + 1e-8))."""
        inverse = sum(w / (value + _EPSILON) for w, value in zip(self.weights, rows.values, strict=True))
        return sum(self.weights) / inverse


class Hinge(Combination):
    """min(r, target): a reward that is satisfied at a target, and has no gradient past it.

    ReFL (Xu et al. 2023, arXiv:2304.05977) minimises relu(2 - r) of ImageReward, which is 2 - min(r, 2): the same
    gradient as this with target 2. It bounds how far each sample is pushed; `Lagrangian` bounds the mean.

    Args:
        reward: the member.
        target: in its units.
        name: default: ``hinge(a, target)``.
    """

    def __init__(self, reward: Reward, target: float, name: str | None = None) -> None:
        if not math.isfinite(target):
            raise ValueError(f"target of reward {reward.name!r} is {target}: it must be finite.")
        super().__init__([reward], name or f"hinge({reward.name}, {target:g})")
        self.target = target

    def combine(self, rows: Rows) -> Tensor:
        """min(r, target)."""
        return rows.values[0].clamp(max=self.target)


class Gate(Combination):
    """r where another reward g reaches a threshold, and a fixed number where it does not.

    A closed gate is a verdict, not a failure: a failed sample would leave its group and teach nothing, and the policy
    is to learn to open it. So ``otherwise`` is a score, and ought to be below what r gives to an open gate; there is
    no default, since 0 is low for one reward and high for another. Gated Reward Accumulation (Sun et al. 2025,
    arXiv:2508.10548) adds nothing, 0, for a closed gate. The gradient is that of r where the gate is open and zero
    where it is closed, so g need not be differentiable.

    Args:
        reward: r, the reward that counts.
        where: g, the reward that opens the gate.
        at_least: the least g that opens it, in g's units.
        otherwise: the score of a closed gate, in r's units.
        name: default: made of the members' names.
    """

    def __init__(
        self, reward: Reward, where: Reward, *, at_least: float, otherwise: float, name: str | None = None
    ) -> None:
        if not (math.isfinite(at_least) and math.isfinite(otherwise)):
            raise ValueError(f"at_least {at_least} and otherwise {otherwise} of a gate must both be finite.")
        super().__init__([reward, where], name or f"gate({reward.name}, {where.name}>={at_least:g})")
        self.differentiable = reward.differentiable
        self.at_least = at_least
        self.otherwise = otherwise

    def combine(self, rows: Rows) -> Tensor:
        """``otherwise``, but r where g >= at_least."""
        value, gate = rows.values
        return torch.where(gate >= self.at_least, value, self.otherwise)
