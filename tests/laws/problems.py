"""Problems whose exact predictions and marginals are known, and the levels that they are solved on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.laws import Law, Level, Prediction, Schedule, flow_schedule


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line; states are rows of shape (B, 1) in float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def of(cls, weights: list[float], means: list[float], stds: list[float]) -> "Mixture":
        return cls(*(torch.tensor(values, dtype=torch.float64) for values in (weights, means, stds)))

    def predict(self, x: Tensor, level: Level) -> Prediction:
        """The posterior mean of x_0 given x = alpha x_0 + sigma noise."""
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        variance = alpha**2 * self.stds**2 + sigma**2
        log_weight = self.weights.log() - 0.5 * (x - alpha * self.means) ** 2 / variance - 0.5 * variance.log()
        component_mean = self.means + alpha * self.stds**2 / variance * (x - alpha * self.means)
        x0 = (log_weight.softmax(1) * component_mean).sum(1, keepdim=True)
        return Prediction(x0, x, level, "sample")


def flow_levels(n: int, high: float = 1.0, low: float = 0.0) -> Schedule:
    """n equal steps of a flow."""
    sigmas = torch.linspace(high, low, n + 1, dtype=torch.float64)
    return flow_schedule(sigmas, sigmas[:-1])


def diffusion_levels(n: int, high: float = 1.0, low: float = 0.0) -> Schedule:
    """n equal steps of the cosine schedule, whose first level has no signal at all."""
    angle = torch.linspace(high, low, n + 1, dtype=torch.float64) * math.pi / 2
    alpha, sigma = angle.cos(), angle.sin()
    alpha[angle == math.pi / 2] = 0
    return Schedule("diffusion", angle[:-1], alpha, sigma, alpha[1:], sigma[1:])


@dataclass(frozen=True)
class Ending:
    """Exact moments of a chain's result."""

    mean: float
    variance: float
    correlation: float  # with the first state


def gaussian_ending(law: Law, schedule: Schedule, mean: float, std: float) -> Ending:
    """The chain from N(0, 1) with the exact prediction for data N(mean, std^2), without a sample.

    Every step is linear in the state, so two states tell it; rows are independent, so one call does all steps.
    """
    steps = torch.arange(len(schedule))
    level, to = schedule.level(steps), schedule.target(steps)
    data = Mixture.of([1.0], [mean], [std])
    zero, one = (law.step(data.predict(torch.full((len(steps), 1), x).double(), level), to) for x in (0.0, 1.0))
    slopes, offsets = (one.mean - zero.mean).flatten().tolist(), zero.mean.flatten().tolist()
    m, variance, covariance = 0.0, 1.0, 1.0
    for slope, offset, spread in zip(slopes, offsets, zero.std.tolist(), strict=True):
        m, variance, covariance = slope * m + offset, slope**2 * variance + spread**2, slope * covariance
    return Ending(m, variance, covariance / math.sqrt(variance))
