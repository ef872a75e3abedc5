"""Noise on some steps only."""

import math

import torch
from torch import Tensor

from diffalign.laws.default import default_law
from diffalign.laws.law import Law
from diffalign.laws.normal import Normal
from diffalign.laws.prediction import Prediction, per_row
from diffalign.laws.schedule import Level, Schedule


class Window(Law):
    """A law on steps start to stop - 1 of a schedule, the deterministic step of the schedule's kind on all others.

    MixGRPO (Li et al. 2025, arXiv 2507.21802) and Flow-GRPO-Fast: outside the window the ODE, so that only the steps
    inside have a density and need training. Rows are told apart by their level, not by a counter, so that they may
    stand at different steps, and a level between two of the schedule's belongs to the step that starts nearest.

    Never memoryless, by the flag: where noise stops early or starts late, the state remembers. Departure: MixGRPO-Flash
    takes a multistep solver after the window; here it is the Euler step, DDIM(0) for a diffusion.

    Args:
        law: inside the window.
        schedule: whose steps are counted.
        start: first step with noise.
        stop: the step after the last one with noise.

    Raises:
        ValueError: the window is empty or leaves the schedule, or the law is none of such a schedule.
    """

    memoryless = False

    def __init__(self, law: Law, schedule: Schedule, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(schedule):
            raise ValueError(
                f"window of steps {start} to {stop} of {len(schedule)}: use 0 <= start < stop <= {len(schedule)}"
            )
        law.stds(schedule)  # raises where it is no law of this schedule
        self.law, self.start, self.stop = law, start, stop
        self.outside = default_law(schedule.kind)
        self.schedules = (schedule.kind,)
        self.marginal_preserving = law.marginal_preserving
        # Half-way between two steps: a device without float64 rounds its levels.
        self._high = float(schedule.sigma[start - 1 : start + 1].mean()) if start else math.inf
        self._low = float(schedule.sigma[stop - 1 : stop + 1].mean())

    def __repr__(self) -> str:
        return f"Window({self.law!r}, steps {self.start} to {self.stop - 1})"

    def std(self, level: Level, to: Level) -> Tensor:
        """Return the law's spread inside the window and 0 outside, (B,)."""
        return torch.where(self._inside(level), self.law.std(level, to), 0)

    def step(self, prediction: Prediction, to: Level) -> Normal:
        """Return the Gaussian of the next state; a point outside the window."""
        inside = self._inside(prediction.level)
        noisy, silent = self.law.step(prediction, to), self.outside.step(prediction, to)
        mean = torch.where(per_row(inside, noisy.mean).bool(), noisy.mean, silent.mean)
        return Normal(mean, torch.where(inside, noisy.std, silent.std))

    def _inside(self, level: Level) -> Tensor:
        return (level.sigma > self._low) & (level.sigma < self._high)
