"""Laws that put fresh noise on the predicted x_0. They keep the level of the noise, not the marginals."""

import math

from torch import Tensor

from diffalign.laws.law import Law
from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction, per_row
from diffalign.laws.schedule import Level


class CPS(Law):
    r"""Coefficients-preserving sampling, Flow-CPS (Wang & Yu 2025, arXiv 2509.05952).

    .. math::
        x_s = \alpha_s \hat x_0 + \sigma_s \cos(\tfrac{\pi \eta}{2})\, \hat\epsilon
            + \sigma_s \sin(\tfrac{\pi \eta}{2})\, z

    The coefficients of signal and noise are those of the level at any eta. That is not to keep the marginals: the
    spread of a step does not shrink with the step, so each replaces part of the noise by noise that knows nothing of
    x_0, and the samples lose entropy. Measured on a mixture of Gaussians in tests/laws/test_ring.py.

    Departures: it is written for any (alpha, sigma), which on a flow is the paper's. The authors' log-prob leaves out
    1 / (2 std^2) and the constants; :class:`Normal` keeps them, so their clip ranges do not carry over.

    Args:
        eta: 0 (the ODE) to 1 (consistency re-noise).

    Raises:
        ValueError: eta is outside [0, 1]; beyond 1 the spread would fall again.
    """

    def __init__(self, eta: float = 0.8) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"CPS eta = {eta} is outside [0, 1]: use 0 for the ODE, 0.8 for Flow-CPS's default")
        self.eta = eta
        self.marginal_preserving = eta == 0
        self.memoryless = eta > 0

    def __repr__(self) -> str:
        return f"CPS(eta={self.eta})"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return sigma_s sin(pi eta / 2), (B,)."""
        return to.sigma * math.sin(math.pi * self.eta / 2)

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state."""
        x0, noise = prediction.x0, prediction.noise
        kept = to.sigma * math.cos(math.pi * self.eta / 2)
        return Normal(per_row(to.alpha, x0) * x0 + per_row(kept, x0) * noise, self.std(prediction.level, to))


class Consistency(Law):
    r"""Predict x_0, re-noise it to the next level: the multistep sampler of consistency and distilled models.

    .. math:: x_s = \alpha_s \hat x_0 + \sigma_s z

    Song et al. 2023, "Consistency models" (arXiv 2303.01469), algorithm 1, for any (alpha, sigma); latent consistency
    models (Luo et al. 2023, arXiv 2310.04378) on a diffusion, diffusers' ``stochastic_sampling`` and
    ``FlowMatchLCMScheduler`` on a flow. It is ``CPS(eta=1)``. Models distilled for few steps were trained for it; for
    any other model it is no sampler of the model's own law.

    Departure: the boundary scalings of LCM, c_skip x + c_out x_0, are left out. At timestep t they differ from 0 and 1
    by 1 / (400 t^2) at most, which is 4e-8 at the last of four steps.
    """

    marginal_preserving = False
    memoryless = True

    def __repr__(self) -> str:
        return "Consistency()"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return sigma_s, (B,)."""
        return to.sigma

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state."""
        x0 = prediction.x0
        return Normal(per_row(to.alpha, x0) * x0, to.sigma)
