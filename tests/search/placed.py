"""The ring on other schedules, with networks that say other things of the same exact denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.laws import Law, PredictionKind, Schedule, flow_schedule
from diffalign.search.space import Rows
from tests.search.problems import Ring


def flow_levels(steps: int) -> Schedule:
    """A rectified flow from pure noise in equal steps."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return flow_schedule(sigmas, sigmas[:-1])


class Placed(Ring):
    """The ring by any schedule and law; `calls` counts the evaluated rows."""

    def __init__(self, schedule: Schedule, law: Law, kind: PredictionKind = "sample", **settings) -> None:
        super().__init__(steps=len(schedule), **settings)
        self.schedule, self.law, self.kind = schedule, law, kind
        self.stochastic = (law.stds(schedule) > 0).tolist()
        self.calls = 0

    def evaluate(self, rows: Rows) -> Tensor:
        """The exact posterior mean of x_0, told as `kind` says."""
        self.calls += len(rows)
        clean, level = super().evaluate(rows), self.schedule.level(rows.steps)
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        noise = (rows.x - alpha * clean) / sigma
        return {
            "sample": clean,
            "epsilon": noise,
            "velocity": noise - clean,
            "v_prediction": alpha * noise - sigma * clean,
        }[self.kind]
