"""Ancestral sampling of a diffusion model."""

from typing import Literal

import torch
from torch import Tensor

from diffalign.laws.law import Law
from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction, at_least_fp32, per_row
from diffalign.laws.schedule import Level


class DDPM(Law):
    r"""Ho et al. 2020, "Denoising diffusion probabilistic models" (arXiv 2006.11239), equation 7 and section 3.2.

    .. math::
        \mu = \frac{\alpha_s \beta}{\sigma_t^2} \hat x_0
            + \frac{\alpha_t \sigma_s^2}{\alpha_s \sigma_t^2} x_t, \qquad
        \beta = \sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2} \sigma_s^2

    The mean is that of the posterior q(x_s | x_t, x_0). The spread is the posterior's, sqrt(beta) sigma_s / sigma_t
    ("fixed_small", which makes the step ``DDIM(eta=1)``), or sqrt(beta) ("fixed_large"), the paper's two choices under
    diffusers' names. With sigma-scaled states the small one is also diffusers' Euler ancestral step, SDXL-Turbo's.

    Departures: beta is written for any (alpha, sigma) and any stride, and equals the paper's 1 - alpha_t^2 / alpha_s^2
    where alpha^2 + sigma^2 = 1. A step to sigma = 0 adds no noise, as in the paper's algorithm 2; diffusers' code asks
    for timestep 0 instead. Learned variances are not there.

    Args:
        variance: "fixed_small" or "fixed_large".

    Raises:
        ValueError: the variance has another name.
    """

    marginal_preserving = True
    memoryless = True

    def __init__(self, variance: Literal["fixed_small", "fixed_large"] = "fixed_small") -> None:
        if variance not in ("fixed_small", "fixed_large"):
            raise ValueError(f"DDPM variance {variance!r} is unknown: use 'fixed_small' or 'fixed_large'")
        self.variance = variance

    def __repr__(self) -> str:
        return f"DDPM({self.variance!r})"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return the spread, (B,)."""
        spread = _beta(level, to).sqrt()
        if self.variance == "fixed_small":
            return spread * to.sigma / level.sigma
        return torch.where(to.sigma > 0, spread, 0)

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state."""
        level, x0, x = prediction.level, prediction.x0, at_least_fp32(prediction.x)
        variance = level.sigma.square()
        of_x0 = to.alpha * _beta(level, to) / variance
        of_x = level.alpha * to.sigma.square() / (to.alpha * variance)
        return Normal(per_row(of_x0, x) * x0 + per_row(of_x, x) * x, self.std(level, to))


def _beta(level: Level, to: Level) -> Tensor:
    """Variance that the forward process adds from ``to`` to ``level``, (B,); rounding may not make it negative."""
    return (level.sigma.square() - (level.alpha * to.sigma / to.alpha).square()).clamp(min=0)
