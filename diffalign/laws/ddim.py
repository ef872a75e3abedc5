"""The DDIM family: deterministic at eta = 0, ancestral (DDPM) at eta = 1."""

from torch import Tensor

from diffalign.laws.law import Law
from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction, per_row
from diffalign.laws.schedule import Level


class DDIM(Law):
    r"""Song et al. 2021, "Denoising diffusion implicit models", equations 12 and 16, for any (alpha, sigma).

    .. math::
        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \varsigma^2}\, \hat\epsilon + \varsigma z, \qquad
        \varsigma = \eta \sigma_s \sqrt{1 - \alpha_t^2 \sigma_s^2 / (\alpha_s^2 \sigma_t^2)}

    On a diffusion schedule the spread is the paper's. On a flow schedule the same expression is the posterior of the
    forward process in flow coordinates, so eta = 0 is the Euler step of the ODE and eta = 1 is ancestral sampling.

    Args:
        eta: 0 to 1.

    Raises:
        ValueError: eta is outside [0, 1].
    """

    marginal_preserving = True

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM eta = {eta} is outside [0, 1]: use 0 for deterministic, 1 for ancestral sampling")
        self.eta = eta
        self.memoryless = eta == 1

    def __repr__(self) -> str:
        return f"DDIM(eta={self.eta})"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return the paper's sigma(eta), (B,)."""
        kept = level.alpha * to.sigma / (to.alpha * level.sigma)
        return self.eta * to.sigma * (1 - kept.square()).clamp(min=0).sqrt()

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state."""
        std = self.std(prediction.level, to)
        direction = (to.sigma.square() - std.square()).clamp(min=0).sqrt()
        x0, noise = prediction.x0, prediction.noise
        return Normal(per_row(to.alpha, x0) * x0 + per_row(direction, x0) * noise, std)
