"""Steps of a rectified flow x_s = (1 - s) x_0 + s noise: the ODE, and SDEs with the same marginals."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.laws.law import Law
from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction, at_least_fp32, per_row
from diffalign.laws.schedule import Level

NoiseCoefficient = Callable[[Tensor, Tensor], Tensor]
"""(sigma (B,), next sigma (B,)) -> the SDE's diffusion coefficient c (B,)."""


class FlowODE(Law):
    """The Euler step of the probability-flow ODE, x' = x + (s' - s) v; deterministic."""

    marginal_preserving = True
    memoryless = False
    schedules = ("flow",)

    def __repr__(self) -> str:
        return "FlowODE()"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return zeros, (B,)."""
        return torch.zeros_like(to.sigma)

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the point of the next state."""
        velocity = prediction.velocity
        time = per_row(to.sigma - prediction.level.sigma, velocity)
        return Normal(at_least_fp32(prediction.x) + time * velocity, self.std(prediction.level, to))


class FlowGRPONoise:
    """c = a sqrt(s / (1 - s)), the coefficient of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470, section 4.2).

    It diverges at s = 1. As in the authors' code the next level then stands in for s inside 1 - s. From a = sqrt(2) on
    the SDE is memoryless.

    Args:
        a: noise level; the paper's default is 0.7, and 0 gives the ODE.
    """

    def __init__(self, a: float = 0.7) -> None:
        if a < 0:
            raise ValueError(f"noise level a = {a} is negative: use 0 for the ODE, 0.7 for Flow-GRPO's default")
        self.a = a

    def __repr__(self) -> str:
        return f"FlowGRPONoise(a={self.a})"

    def __call__(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """Return c, (B,)."""
        return self.a * (sigma / (1 - torch.where(sigma == 1, next_sigma, sigma))).sqrt()


class DanceGRPONoise:
    """c = eta at every level, the coefficient of DanceGRPO (Xue et al. 2025, arXiv 2505.07818) and of its code.

    Most of its pull on the state, c^2 / (2 s), comes at the end: the last step from s to 0 takes eta^2 / 2 of the
    predicted noise away and adds eta sqrt(s). The result so holds noise of that size; DanceGRPO scores x_0 as predicted
    before that step.

    Args:
        eta: noise level; 0.3 in the authors' scripts for FLUX, and 0 gives the ODE.
    """

    def __init__(self, eta: float = 0.3) -> None:
        if eta < 0:
            raise ValueError(f"noise level eta = {eta} is negative: use 0 for the ODE, 0.3 for DanceGRPO's default")
        self.eta = eta

    def __repr__(self) -> str:
        return f"DanceGRPONoise(eta={self.eta})"

    def __call__(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """Return c, (B,)."""
        return torch.full_like(sigma, self.eta)


class FlowSDE(Law):
    r"""The Euler-Maruyama step of an SDE that has the marginals of the flow.

    .. math::
        x' = x \left(1 + \tfrac{c^2}{2 s} \Delta\right) + v \left(1 + \tfrac{c^2 (1 - s)}{2 s}\right) \Delta
             + c \sqrt{-\Delta}\, z, \qquad \Delta = s' - s < 0

    One kernel for Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and, with a constant c, DanceGRPO (Xue et al. 2025,
    arXiv 2505.07818), whose code writes the same drift with the score -(x + (1 - s) v) / s. It departs from both only
    in taking c from any function of the levels.

    Of strong order 1, as the noise is additive; from s = 1, where Flow-GRPO's c is singular, of order min(1, a^2 / 2).

    Args:
        noise_coefficient: c as a function of (s, s').
    """

    marginal_preserving = True
    schedules = ("flow",)

    def __init__(self, noise_coefficient: NoiseCoefficient | None = None) -> None:
        self.noise_coefficient = FlowGRPONoise() if noise_coefficient is None else noise_coefficient
        coefficient = self.noise_coefficient
        # Of other coefficients it is not known: they would have to reach that of a = sqrt(2) at every level.
        root = math.sqrt(2)
        self.memoryless = isinstance(coefficient, FlowGRPONoise) and (
            coefficient.a > root or math.isclose(coefficient.a, root)
        )

    def __repr__(self) -> str:
        return f"FlowSDE({self.noise_coefficient!r})"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return c sqrt(s - s'), (B,)."""
        return self.noise_coefficient(level.sigma, to.sigma) * (level.sigma - to.sigma).sqrt()

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state."""
        level = prediction.level
        time = to.sigma - level.sigma
        drift = self.noise_coefficient(level.sigma, to.sigma).square() / (2 * level.sigma)
        velocity, x = prediction.velocity, at_least_fp32(prediction.x)
        mean = per_row(1 + drift * time, x) * x + per_row((1 + drift * (1 - level.sigma)) * time, x) * velocity
        return Normal(mean, self.std(level, to))
