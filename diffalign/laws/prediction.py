"""What a network said about a state, and the three quantities that follow from it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffalign.laws.schedule import Level

PredictionKind = Literal["epsilon", "v_prediction", "sample", "velocity"]


@dataclass(eq=False)
class Prediction:
    """The raw network output at a state; x0, noise and velocity are derived when asked, in fp32 at least.

    Attributes:
        output: (B, ...) what the network returned, in any floating type.
        x: (B, ...) the state that it was given.
        level: where each row stands.
        kind: what the output means. "epsilon": the noise (Ho et al. 2020); "v_prediction": alpha noise - sigma x_0
            with alpha^2 + sigma^2 = 1 (Salimans & Ho 2022); "sample": x_0; "velocity": noise - x_0 with
            alpha + sigma = 1 (Liu et al. 2022, Lipman et al. 2022).
    """

    output: Tensor
    x: Tensor
    level: Level
    kind: PredictionKind

    @cached_property
    def x0(self) -> Tensor:
        """(B, ...) the clean latent."""
        output, x, alpha, sigma = self._terms
        if self.kind == "epsilon":
            return (x - sigma * output) / alpha
        if self.kind == "v_prediction":
            return alpha * x - sigma * output
        return output if self.kind == "sample" else x - sigma * output

    @cached_property
    def noise(self) -> Tensor:
        """(B, ...) the noise."""
        output, x, alpha, sigma = self._terms
        if self.kind == "epsilon":
            return output
        if self.kind == "v_prediction":
            return alpha * output + sigma * x
        return (x - alpha * output) / sigma if self.kind == "sample" else x + alpha * output

    @cached_property
    def velocity(self) -> Tensor:
        """(B, ...) noise - x_0, the direction of growing noise of a flow."""
        return self._terms[0] if self.kind == "velocity" else self.noise - self.x0

    def square_distance(self, other: "Prediction") -> Tensor:
        """(B,) mean over elements of the squared difference of the two outputs, which mean the same."""
        return (at_least_fp32(self.output) - at_least_fp32(other.output)).square().flatten(1).mean(1)

    @property
    def _terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output, x = at_least_fp32(self.output), at_least_fp32(self.x)
        return output, x, per_row(self.level.alpha, x), per_row(self.level.sigma, x)


def noised(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Return alpha x_0 + sigma noise, (B, ...): clean latents at levels (B,), or at one level (1,)."""
    return per_row(level.alpha, x0) * x0 + per_row(level.sigma, noise) * noise


def at_least_fp32(x: Tensor) -> Tensor:
    """Return the tensor in fp32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) coefficients so that they multiply the rows of ``like`` (B, ...), in its type."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
