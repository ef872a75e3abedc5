"""The spread inside the modes of a ring of Gaussians at 10, 28, 100 and 400 steps, by a flow with its exact velocity.

Reference figures: an independent measurement of the same problem, made before these laws were written. Ours have a
standard error of 0.008; theirs are rounded to 0.01 and come from a sample of their own, so that two agree within 0.04,
three standard errors of the difference. What the laws say of themselves is tested without samples, test_properties.py.
"""

import math

import pytest
import torch
from torch import Tensor

from diffalign.laws import (
    CPS,
    DDIM,
    DDPM,
    Consistency,
    DanceGRPONoise,
    FlowGRPONoise,
    FlowODE,
    FlowSDE,
    Law,
    Level,
    Normal,
    Prediction,
)
from tests.laws.problems import flow_levels

STEPS = (10, 28, 100, 400)
SAMPLES, TOLERANCE = 4_000, 0.04
STD, RADIUS = 0.3, 4
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MODES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
FIGURES: list[tuple[Law, tuple[float, ...]]] = [
    (FlowODE(), (1.02, 1.00, 0.99, 0.99)),
    (DDIM(1.0), (0.86, 0.89, 0.96, 0.99)),
    (DDIM(0.5), (0.98, 0.96, 0.99, 0.99)),
    (FlowSDE(FlowGRPONoise(0.7)), (1.04, 1.00, 1.01, 1.00)),
    (FlowSDE(FlowGRPONoise(1.0)), (1.04, 1.00, 1.02, 1.00)),
    (CPS(0.5), (0.90, 0.86, 0.90, 0.92)),
    (CPS(0.7), (0.82, 0.79, 0.83, 0.84)),
    (Consistency(), (0.67, 0.65, 0.69, 0.69)),
]


class EulerPlusNoise(FlowODE):
    """0.1 z after each Euler step but the last: no law at all, so that the test is seen to see it."""

    def std(self, level: Level, to: Level) -> Tensor:
        return torch.where(to.sigma > 0, 0.1, 0.0)

    def step(self, prediction: Prediction, to: Level) -> Normal:
        return Normal(super().step(prediction, to).mean, self.std(prediction.level, to))


def predict(x: Tensor, level: Level) -> Prediction:
    """The posterior mean of x_0, states (B, 2); all modes are as far from the centre, so only angles weigh them."""
    alpha, sigma = level.alpha[:1], level.sigma[:1]
    variance = alpha**2 * STD**2 + sigma**2
    nearest = (x @ MODES.T * (alpha / variance)).softmax(1) @ MODES
    return Prediction(nearest + alpha * STD**2 / variance * (x - alpha * nearest), x, level, "sample")


def spread(law: Law, n: int) -> tuple[float, float]:
    """(std of a mode's samples round their mean over the true one, fraction farther than 4 std from every mode)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    schedule, x = flow_levels(n), draw()
    for i in range(n):
        x = law.step(predict(x, schedule.level(i).expand(SAMPLES)), schedule.target(i).expand(SAMPLES)).sample(draw())
    distance, mode = torch.cdist(x, MODES).min(1)
    variances = [x[mode == m].var(0, correction=0).mean() for m in range(len(MODES))]
    return float(torch.stack(variances).mean().sqrt()) / STD, float((distance > 4 * STD).double().mean())


@pytest.mark.parametrize(("law", "figures"), FIGURES, ids=lambda v: repr(v) if isinstance(v, Law) else "")
def test_the_spread_inside_the_modes(law: Law, figures: tuple[float, ...]) -> None:
    measured = [spread(law, n) for n in STEPS]
    print(f"{law!r:36}", *(f"{ratio:.3f}/{off:.4f}" for ratio, off in measured))
    assert [ratio for ratio, _ in measured] == pytest.approx(figures, abs=TOLERANCE)
    assert max(off for _, off in measured) < 0.01
    assert (measured[-1][0] > 1 - TOLERANCE) == law.marginal_preserving


@pytest.mark.parametrize("law", [FlowSDE(DanceGRPONoise(0.3)), DDPM("fixed_large"), FlowSDE(FlowGRPONoise(2**0.5))])
def test_laws_without_a_reference_figure_find_the_true_spread(law: Law) -> None:
    ratio, off = spread(law, 100)
    print(f"{law!r:36}", f"{ratio:.3f}/{off:.4f} at 100")
    assert ratio == pytest.approx(1, abs=TOLERANCE)
    assert off < 0.01


def test_euler_plus_noise_gets_worse_with_more_steps() -> None:
    measured = [spread(EulerPlusNoise(), n) for n in STEPS]
    print(f"{'Euler + 0.1 z':36}", *(f"{ratio:.3f}/{off:.4f}" for ratio, off in measured))
    assert [ratio for ratio, _ in measured] == pytest.approx((1.15, 1.44, 2.25, 3.75), rel=TOLERANCE)
    assert measured[-1][1] == pytest.approx(0.59, abs=TOLERANCE)
