"""What a step law is."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction
from diffalign.laws.schedule import Level, Schedule, ScheduleKind


class Law(ABC):
    """The distribution of the next state given a prediction. Stateless, and row by row.

    Attributes:
        marginal_preserving: with an exact prediction the states keep the marginals of the forward process, up to an
            error that vanishes with the steps.
        memoryless: what the final state keeps of a first state of pure noise is of order 1/N in N steps. Then the
            optimum of reward minus KL over the chain tilts the final law of the chain to p exp(r / beta)
            (Domingo-Enrich et al. 2024, arXiv 2409.08861, proposition 1). Departure: the proposition asks for the limit
            only, which every noisy law of a flow from s = 1 reaches, ``FlowSDE`` however as N^(-a^2 / 2): at a = 0.7
            the correlation still falls only from 0.16 to 0.12 between 100 and 400 steps. So the flag asks for the rate.
        schedules: kinds of schedule that it is a law of.
    """

    marginal_preserving: bool
    memoryless: bool
    schedules: tuple[ScheduleKind, ...] = ("diffusion", "flow")

    @abstractmethod
    def std(self, level: Level, to: Level) -> Tensor:
        """Return the spread of the step of each row, (B,), in the type of the levels."""

    @abstractmethod
    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the state at level ``to``, given the prediction at its own level."""

    def stds(self, schedule: Schedule) -> Tensor:
        """Return the spread of every step of a schedule, (N,) float64 on the host; zeros are deterministic steps.

        Raises:
            ValueError: the schedule is of a kind that this is no law of.
        """
        if schedule.kind not in self.schedules:
            raise ValueError(
                f"{self!r} is no law of a {schedule.kind} schedule, only of {' and '.join(self.schedules)}: "
                f"use default_law({schedule.kind!r}, noise)"
            )
        steps = torch.arange(len(schedule))
        return self.std(schedule.level(steps), schedule.target(steps))
