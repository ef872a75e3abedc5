"""Rules that say where the gradient flows through a rollout."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Where the gradient flows in one rollout.

    Attributes:
        graded: steps whose denoiser evaluation has a graph, ascending. Before the first one nothing has.
        detach_input: the denoiser sees a detached state at those steps, so that gradient reaches earlier steps only by
            the sampler's own linear path.
        stop: step whose prediction of x_0 is the result; None to run to the end.
    """

    graded: tuple[int, ...]
    detach_input: bool = False
    stop: int | None = None


class GradientRule(ABC):
    """How much of a trajectory is differentiated."""

    @abstractmethod
    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Return the plan of one rollout of ``num_steps`` steps; what is random is drawn here, once."""


@dataclass(frozen=True)
class Full(GradientRule):
    """Through every step."""

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Return all steps."""
        return Plan(tuple(range(num_steps)))


@dataclass(frozen=True)
class LastK(GradientRule):
    """Through the last k steps (DRaFT-K: Clark et al. 2023, arXiv 2309.17400), and their inputs.

    Attributes:
        k: 1 to the number of steps.
    """

    k: int

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Return the last k steps; ValueError where there are fewer."""
        if not 1 <= self.k <= num_steps:
            raise ValueError(f"gradient through k = {self.k} of {num_steps} steps: use 1 to {num_steps}")
        return Plan(tuple(range(num_steps - self.k, num_steps)))


@dataclass(frozen=True)
class RandomK(GradientRule):
    """As LastK with k uniform in low..high, once for a rollout (AlignProp: Prabhudesai et al. 2023, arXiv 2310.03739).

    Attributes:
        low: smallest k, at least 1; the paper's range starts at 0, which has no gradient.
        high: largest k, included.
    """

    low: int
    high: int

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Draw k; ValueError where the range is empty or exceeds the steps."""
        if not 1 <= self.low <= self.high <= num_steps:
            raise ValueError(
                f"random k from {self.low} to {self.high} of {num_steps} steps: use 1 <= low <= high <= steps"
            )
        return LastK(int(generator.integers(self.low, self.high, endpoint=True))).plan(num_steps, generator)


@dataclass(frozen=True)
class DRTune(GradientRule):
    """k equally spaced steps with detached inputs, and a random early stop (Wu et al. 2024, arXiv 2405.00760).

    The stop is uniform in the last ``early_stop`` of the steps; the steps with gradient lie before or at it, a fixed
    stride apart from a random start.

    Attributes:
        k: steps with gradient; all steps up to the stop where there are fewer.
        early_stop: fraction of the steps in which the stop may fall, 0 to run to the end.
    """

    k: int = 3
    early_stop: float = 0.4

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Draw the stop and the start; ValueError where k or the fraction makes no sense."""
        if not 1 <= self.k <= num_steps:
            raise ValueError(f"gradient at k = {self.k} of {num_steps} steps: use 1 to {num_steps}")
        if not 0 <= self.early_stop < 1:
            raise ValueError(
                f"early_stop = {self.early_stop} is outside [0, 1): use a fraction such as 0.4, or 0 for none"
            )
        window = round(num_steps * self.early_stop)
        stop = num_steps - int(generator.integers(1, window, endpoint=True)) if window else None
        taken = num_steps if stop is None else stop + 1
        k = min(self.k, taken)
        stride = taken // k
        start = int(generator.integers(0, taken - (k - 1) * stride))
        return Plan(tuple(range(start, start + k * stride, stride)), detach_input=True, stop=stop)
