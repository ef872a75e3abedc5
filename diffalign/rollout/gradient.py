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
        renoised: times that the result is noised back to the level of ``stop`` and x_0 predicted again, with a graph.
    """

    graded: tuple[int, ...]
    detach_input: bool = False
    stop: int | None = None
    renoised: int = 0


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


@dataclass(frozen=True)
class Sparse(GradientRule):
    """k random steps, late ones oftener, with detached inputs (FlowBP-Sparse: Wang et al. 2026, arXiv 2606.11075).

    The paper samples without gradient, evaluates k recorded states again with gradient, rebuilds x_0 from the outputs
    by the sampler's steps and puts it straight through onto the sample. With detached inputs the rollout itself is that
    rebuilding: the same value and the same gradient, of any law, without the k evaluations. So only the choice of steps
    sets it apart from ``DRTune(k, early_stop=0)``, and ``Sparse(N)`` is ``DRTune(N, early_stop=0)``.

    Departure: the gradient is not rescaled by the share of the path that was drawn; the authors' recipes do so by 0, a
    half or the whole.

    Attributes:
        k: steps with gradient, 1 to the number of steps.
        late_bias: steps are drawn one after the other without replacement, step i of 0..N-1 with a probability
            proportional to (i + 1) ** late_bias; 0 is uniform.
    """

    k: int = 3
    late_bias: float = 2.0

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Draw the steps; ValueError where k or the bias makes no sense."""
        if not 1 <= self.k <= num_steps:
            raise ValueError(f"gradient at k = {self.k} of {num_steps} steps: use 1 to {num_steps}")
        if not 0 <= self.late_bias < np.inf:
            raise ValueError(f"late_bias = {self.late_bias} is no bias: use a number such as 2, or 0 for uniform steps")
        # The k largest of log-weights with Gumbel noise are k such draws (Vieira 2014, "Gumbel-max trick and weighted
        # reservoir sampling").
        keys = self.late_bias * np.log(np.arange(1, num_steps + 1)) + generator.gumbel(size=num_steps)
        return Plan(tuple(sorted(np.argsort(keys)[-self.k :].tolist())), detach_input=True)


@dataclass(frozen=True)
class LowVariance(GradientRule):
    """The last step, and n more with fresh noise at its level (DRaFT-LV: Clark et al. 2023, arXiv 2309.17400).

    x_0 is predicted at the last level, held constant, noised back to that level n times, and predicted again each time.
    The rewards of all n + 1 predictions of a row are averaged, by whoever scores them.

    Like LastK(1) it has next to no gradient where the last level lies near sigma = 0. SD3's scheduler ends at 0.009
    (0.001 with shift 1), which ``skip=1`` leaves out: the level before it, 0.12 in 25 steps, then is the last one. The
    FlowBP code reaches the same by giving SD3 a table of its own, that ends at 0.11.

    Attributes:
        n: predictions beside the first; the paper's is 2.
        skip: steps left out at the end, below the number of steps.
    """

    n: int = 2
    skip: int = 0

    def plan(self, num_steps: int, generator: np.random.Generator) -> Plan:
        """Return the last step that is not left out; ValueError where n or skip makes no sense."""
        if self.n < 1:
            raise ValueError(f"n = {self.n} predictions from fresh noise: use 1 or more, or LastK(1) for none")
        if not 0 <= self.skip < num_steps:
            raise ValueError(f"skip = {self.skip} leaves no step of {num_steps}: use 0 to {num_steps - 1}")
        last = num_steps - 1 - self.skip
        return Plan((last,), stop=last, renoised=self.n)
