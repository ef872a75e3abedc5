"""What a step law is."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction
from diffalign.laws.schedule import Level, Schedule


class Law(ABC):
    """The distribution of the next state given a prediction. Stateless, and row by row.

    Attributes:
        marginal_preserving: with an exact prediction and small steps, the states keep the marginals of the forward
            process.
        memoryless: the final state is independent of the initial noise in the same limit, which is what makes the
            KL-regularised optimum of the chain equal p exp(r / beta) (Domingo-Enrich et al. 2024).
    """

    marginal_preserving: bool
    memoryless: bool

    @abstractmethod
    def std(self, level: Level, to: Level) -> Tensor:
        """Return the spread of the step of each row, (B,), in the type of the levels."""

    @abstractmethod
    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the state at level ``to``, given the prediction at its own level."""

    def stds(self, schedule: Schedule) -> Tensor:
        """Return the spread of every step of a schedule, (N,) float64 on the host; zeros are deterministic steps."""
        steps = torch.arange(len(schedule))
        return self.std(schedule.level(steps), schedule.target(steps))
