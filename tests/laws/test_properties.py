"""What each law says of itself, measured without a sample: the chain on Gaussian data is linear, its moments exact."""

import pytest

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
    Window,
)
from tests.laws.problems import diffusion_levels, flow_levels, gaussian_ending

MEAN, STD = 0.7, 0.5
ROOT = 2**0.5
BOTH = [DDIM(0.0), DDIM(0.5), DDIM(1.0), DDPM(), DDPM("fixed_large"), CPS(0.0), CPS(0.2), CPS(0.8), Consistency()]
FLOW = [
    FlowODE(),
    *(FlowSDE(FlowGRPONoise(a)) for a in (0.7, 1.0, 1.2, ROOT, 1.6)),
    FlowSDE(DanceGRPONoise(0.3)),
    FlowSDE(DanceGRPONoise(1.0)),
]
CASES = [(law, flow_levels) for law in BOTH + FLOW] + [(law, diffusion_levels) for law in BOTH]


def name(value: object) -> str:
    return value.__name__ if callable(value) else repr(value)


def variance_error(law: Law, levels: object, n: int) -> float:
    ending = gaussian_ending(law, levels(n), MEAN, STD)  # type: ignore[operator]
    assert ending.mean == pytest.approx(MEAN, abs=1e-12)
    return ending.variance / STD**2 - 1


@pytest.mark.parametrize(("law", "levels"), CASES, ids=name)
def test_the_marginals_are_kept_where_the_law_says_so(law: Law, levels: object) -> None:
    """The variance's relative error falls below 2e-3 at 25,600 steps, or stays above 2e-2."""
    error = abs(variance_error(law, levels, 25_600))
    assert error < 2e-3 if law.marginal_preserving else error > 2e-2


@pytest.mark.parametrize(
    ("law", "levels"),
    [(law, levels) for law, levels in CASES if isinstance(law, DDIM | DDPM | FlowODE)],
    ids=name,
)
def test_the_error_of_the_marginals_is_of_order_one(law: Law, levels: object) -> None:
    ratio = variance_error(law, levels, 1_600) / variance_error(law, levels, 6_400)
    assert ratio == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize(("law", "levels"), CASES, ids=name)
def test_the_initial_noise_is_forgotten_where_the_law_says_so(law: Law, levels: object) -> None:
    """Memoryless: sixteen times the steps leave a sixteenth of the correlation, or less."""
    few, many = (abs(gaussian_ending(law, levels(n), MEAN, STD).correlation) for n in (100, 1_600))  # type: ignore
    assert (many <= few / 16) == law.memoryless, (few, many)


@pytest.mark.parametrize("a", [0.7, 1.0, 1.2])
def test_flow_grpo_forgets_as_a_power_of_the_steps(a: float) -> None:
    """N^(-a^2 / 2), from the memory alpha exp(integral) of proposition 1 cut off at the first step."""
    law = FlowSDE(FlowGRPONoise(a))
    few, many = (gaussian_ending(law, flow_levels(n), MEAN, STD).correlation for n in (1_600, 25_600))
    assert many / few == pytest.approx(16 ** (-(a**2) / 2), rel=0.02)


def test_the_figures_of_the_documentation() -> None:
    law = FlowSDE(FlowGRPONoise(0.7))
    few, many = (gaussian_ending(law, flow_levels(n), MEAN, STD).correlation for n in (100, 400))
    assert (round(few, 2), round(many, 2)) == (0.16, 0.12)


@pytest.mark.parametrize(("start", "stop"), [(0.2, 0.6), (0.5, 1.0)])
def test_a_window_keeps_the_marginals_and_remembers(start: float, stop: float) -> None:
    def window(n: int) -> Window:
        return Window(DDIM(1.0), diffusion_levels(n), int(start * n), int(stop * n))

    assert window(100).marginal_preserving
    assert not Window(CPS(0.8), diffusion_levels(100), 0, 50).marginal_preserving
    few, many = (gaussian_ending(window(n), diffusion_levels(n), MEAN, STD) for n in (100, 6_400))
    assert abs(many.variance / STD**2 - 1) < 2e-3
    assert abs(many.correlation) > 0.9 * abs(few.correlation) > 0.02
    assert not window(100).memoryless
