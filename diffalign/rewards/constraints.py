"""A reward under constraints on others, by Lagrange multipliers that follow how far each is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.combination import Combination, Rows


class Lagrangian(Combination):
    """r_0 + sum_k lambda_k (r_k - c_k): maximise r_0 while E r_k >= c_k, with lambda_k >= 0 by dual descent.

    `observe`, which a trainer calls once a step: lambda_k <- max(0, lambda_k - eta (mean r_k - c_k)). A constraint
    that is broken weighs more from step to step, one that is met less, down to nothing. To hold a reward below a bound,
    constrain its negative: ``(-a, -bound)``. Composite rewards under such constraints: Moskovitz et al. (2023),
    arXiv:2310.04373; one cost: Safe RLHF, Dai et al. (2023), arXiv:2310.12773. Departures from Safe RLHF: the step is
    on lambda and projected, theirs is on log lambda; theirs divides the whole by 1 + lambda, this does not, so that the
    total grows with the multipliers (methods that standardise advantages do not see it).

    Scores depend on the multipliers, so they belong to a checkpoint: `state_dict`. Between updates they are fixed, and
    a sample's score depends on itself alone. Under several processes give `observe` the means over all of them.

    Args:
        objective: r_0.
        constraints: (r_k, c_k) pairs, c_k in units of r_k.
        rate: eta > 0; per unit of r_k, and in units of r_0 per unit of r_k.
        name: default: made of the members' names.
    """

    def __init__(
        self, objective: Reward, constraints: Sequence[tuple[Reward, float]], rate: float, name: str | None = None
    ) -> None:
        self.thresholds = {reward.name: float(threshold) for reward, threshold in constraints}
        if not constraints or len(self.thresholds) < len(constraints):
            names = [reward.name for reward, _ in constraints]
            raise ValueError(f"constraints on {names}: a Lagrangian takes one on each of one or more rewards.")
        if not all(map(math.isfinite, self.thresholds.values())):
            raise ValueError(f"thresholds {self.thresholds} of a Lagrangian must be finite.")
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate is {rate}: the step of the multipliers is a number above 0.")
        shown = (f"{reward.name}>={threshold:g}" for reward, threshold in constraints)
        super().__init__(
            [objective, *(reward for reward, _ in constraints)], name or f"{objective.name} | {', '.join(shown)}"
        )
        self.rate = rate
        self.multipliers = dict.fromkeys(self.thresholds, 0.0)

    def combine(self, rows: Rows) -> Tensor:
        """r_0 + sum_k lambda_k (r_k - c_k)."""
        objective, *others = rows.values
        each = zip(self.multipliers.values(), self.thresholds.values(), others, strict=True)
        return objective + sum(multiplier * (value - threshold) for multiplier, threshold, value in each)

    def observe(self, means: Mapping[str, Tensor | float]) -> None:
        """One dual step, lambda_k <- max(0, lambda_k - eta (mean r_k - c_k)).

        Args:
            means: reward name -> its mean, or its scores, as in ``parts`` of a score. Failed ones (NaN) are left out; a
                multiplier whose reward has none stays.
        """
        for name, threshold in self.thresholds.items():
            if name not in means:
                raise ValueError(f"no scores of reward {name!r}, which is constrained; there are {[*means]}.")
            values = torch.as_tensor(means[name], dtype=torch.float64).detach().flatten()
            values = values[values.isfinite()]
            if len(values):
                slack = float(values.mean()) - threshold
                self.multipliers[name] = max(0.0, self.multipliers[name] - self.rate * slack)

    def state_dict(self) -> dict[str, Any]:
        """The multipliers, as plain numbers."""
        return {"multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        multipliers = {name: float(number) for name, number in state["multipliers"].items()}
        if multipliers.keys() != self.multipliers.keys():
            raise ValueError(
                f"the state has multipliers of {[*multipliers]}, and the constraints are on {[*self.multipliers]}."
            )
        if not all(math.isfinite(number) and number >= 0 for number in multipliers.values()):
            raise ValueError(f"multipliers {multipliers} must be finite and at least 0.")
        self.multipliers = {name: multipliers[name] for name in self.multipliers}
