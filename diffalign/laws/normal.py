"""The Gaussian of one step: a mean for each element and one spread for each row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.laws.prediction import at_least_fp32, per_row

Reduction = Literal["sum", "mean"]


@dataclass(eq=False)
class Normal:
    """N(mean, std^2 I) for each row. A row whose std is 0 is a point: it can be sampled but has no density.

    Every reduction over latent elements is named: "sum" is in nats; "mean" is that divided by the number of elements,
    the convention of Flow-GRPO and DanceGRPO.

    Attributes:
        mean: (B, ...) in fp32 or float64.
        std: (B,) in any floating type.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def cat(cls, parts: Sequence["Normal"]) -> "Normal":
        """Put the rows of all parts in one batch."""
        return cls(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    def rows(self, index: slice | Tensor) -> "Normal":
        """Select rows."""
        return Normal(self.mean[index], self.std[index])

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std noise, (B, ...)."""
        return self.mean + per_row(self.std, self.mean) * noise

    def log_prob(self, x: Tensor, reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return the log-density at ``x``, (B,).

        Args:
            x: (B, ...) the next state exactly as it was stored; a rounded copy has another density.
            reduction: over the latent elements.
            validate: look for rows without density, which waits for the device. Callers that know every row's spread
                from the host table may leave it out.

        Raises:
            ValueError: a row is deterministic.
        """
        if validate:
            self._refuse_points("log_prob")
        std = per_row(self.std, self.mean)
        z = (at_least_fp32(x) - self.mean) / std
        return reduce_elements(-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)

    def log_ratio(self, x: Tensor, other: "Normal", reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return log self(x) - log other(x), (B,), subtracted element by element before it is reduced.

        The difference of squares is factored: nearly equal Gaussians lose no digits and equal ones give exactly 0.

        Raises:
            ValueError: a row is deterministic.
        """
        if validate:
            self._refuse_points("log_ratio")
            other._refuse_points("log_ratio")
        x = at_least_fp32(x)
        std, other_std = per_row(self.std, self.mean), per_row(other.std, self.mean)
        z, other_z = (x - self.mean) / std, (x - other.mean) / other_std
        return reduce_elements(0.5 * (other_z - z) * (other_z + z) + (other_std / std).log(), reduction)

    def kl(self, other: "Normal", reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return KL(self || other), (B,), in closed form.

        Raises:
            ValueError: a row is deterministic.
        """
        if validate:
            self._refuse_points("kl")
            other._refuse_points("kl")
        std, other_std = per_row(self.std, self.mean), per_row(other.std, self.mean)
        ratio = std / other_std
        shift = (self.mean - other.mean) / other_std
        # Of Gaussians of one spread this is shift^2 / 2 to the last digit, however near they are.
        return reduce_elements(0.5 * ((ratio - 1) * (ratio + 1) + shift.square()) - ratio.log(), reduction)

    def chi2(self, other: "Normal", reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return chi^2(self || other) = E_other[(self / other)^2] - 1, (B,), in closed form.

        Elements are independent, and 1 + chi^2 is the product over them: "sum" is the divergence itself, "mean" that of
        an element of the geometric mean. Near equality it is twice the KL; far away it grows exponentially. It is
        infinite where the spread of self is the root of 2 times other's, or more.

        Raises:
            ValueError: a row is deterministic.
        """
        if validate:
            self._refuse_points("chi2")
            other._refuse_points("chi2")
        std, other_std = per_row(self.std, self.mean), per_row(other.std, self.mean)
        ratio = std / other_std
        shift = (self.mean - other.mean) / other_std
        left = 2 - ratio.square()
        logs = torch.where(left > 0, shift.square() / left - ratio.log() - 0.5 * left.log(), torch.inf)
        return reduce_elements(logs, reduction).expm1()

    def _refuse_points(self, what: str) -> None:
        points = int((self.std == 0).sum())
        if points:
            raise ValueError(
                f"{what} of {points} deterministic rows of {len(self.std)} (std = 0) does not exist: "
                "use a stochastic law (DDIM eta > 0, FlowSDE a > 0) or leave those steps out"
            )


def reduce_elements(elements: Tensor, reduction: Reduction) -> Tensor:
    """Reduce (B, ...) over all but the rows, to (B,).

    Raises:
        ValueError: the reduction is neither "sum" nor "mean".
    """
    flat = elements.flatten(1)
    if reduction == "sum":
        return flat.sum(1)
    if reduction == "mean":
        return flat.mean(1)
    raise ValueError(f"reduction {reduction!r} is unknown: use 'sum' or 'mean'")
