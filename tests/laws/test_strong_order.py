"""Paths of the same noise at 16 to 256 steps: those of an SDE converge one by one, of order 1 with additive noise."""

import itertools
import math

import pytest
import torch

from diffalign.laws import CPS, DDIM, DDPM, DanceGRPONoise, FlowGRPONoise, FlowODE, FlowSDE, Law
from tests.laws.problems import Mixture, diffusion_levels, flow_levels

PATHS, FINEST, COARSEST = 300, 256, 16
# Overlapping components: the drift is nonlinear, but no path can jump from one mode to another on a rounding error.
DATA = Mixture.of([0.4, 0.6], [-0.6, 0.5], [0.5, 0.4])


def strong_order(law: Law, levels: object, high: float, low: float) -> float:
    """Slope of the root mean square distance between the ends of paths at N and 2N steps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    first, noise, ends = draw(PATHS, 1), draw(FINEST, PATHS, 1), []
    while len(noise) >= COARSEST:
        schedule, x = levels(len(noise), high, low), first  # type: ignore[operator]
        for i, z in enumerate(noise):
            level, to = schedule.level(i).expand(PATHS), schedule.target(i).expand(PATHS)
            x = law.step(DATA.predict(x, level), to).sample(z)
        ends.append(x)
        noise = (noise[0::2] + noise[1::2]) / math.sqrt(2)  # the Brownian increments of steps twice as long
    errors = [float((fine - coarse).square().mean().sqrt()) for fine, coarse in itertools.pairwise(ends)]
    order = math.log2(errors[-1] / errors[0]) / (len(errors) - 1)
    print(f"{law!r:36} {high} to {low}: errors {[f'{e:.1e}' for e in errors]}, order {order:.2f}")
    return order


@pytest.mark.parametrize(
    ("law", "levels"),
    [
        (FlowSDE(FlowGRPONoise(0.7)), flow_levels),
        (FlowSDE(FlowGRPONoise(2**0.5)), flow_levels),
        (FlowSDE(DanceGRPONoise(0.3)), flow_levels),
        (DDIM(1.0), flow_levels),
        (DDPM("fixed_large"), flow_levels),
        (DDIM(0.5), diffusion_levels),
        (FlowODE(), flow_levels),
    ],
    ids=lambda v: repr(v) if isinstance(v, Law) else v.__name__,
)
def test_strong_order_is_one(law: Law, levels: object) -> None:
    assert strong_order(law, levels, 0.95, 0.05) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    ("law", "order"), [(FlowSDE(FlowGRPONoise(0.7)), 0.245), (FlowSDE(FlowGRPONoise(2**0.5)), 1)], ids=repr
)
def test_from_pure_noise_the_order_of_flow_grpo_is_half_the_square_of_a(law: Law, order: float) -> None:
    assert strong_order(law, flow_levels, 1.0, 0.0) == pytest.approx(order, abs=0.1)


def test_cps_has_no_limit_of_paths() -> None:
    assert abs(strong_order(CPS(0.5), flow_levels, 0.95, 0.05)) < 0.1
