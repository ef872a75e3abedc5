"""The density of a step of each law: it integrates to 1, has the moments of its samples, and its KL is the integral."""

import pytest
import torch

from diffalign.laws import CPS, DDIM, DDPM, Consistency, DanceGRPONoise, FlowGRPONoise, FlowSDE, Law, Normal, Prediction
from tests.laws.problems import flow_levels

GRID = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
SCHEDULE = flow_levels(6)
ROWS = torch.tensor([0, 2, 4])
LAWS = [
    DDIM(0.7),
    DDPM(),
    DDPM("fixed_large"),
    FlowSDE(FlowGRPONoise(0.7)),
    FlowSDE(DanceGRPONoise(0.3)),
    CPS(0.8),
    Consistency(),
]


def step(law: Law, velocity: float) -> Normal:
    """The step of three rows of one element, each at a level of its own."""
    x = torch.tensor([[0.4], [-1.1], [0.9]], dtype=torch.float64)
    prediction = Prediction(torch.full_like(x, velocity), x, SCHEDULE.level(ROWS), "velocity")
    return law.step(prediction, SCHEDULE.target(ROWS))


def log_density(normal: Normal) -> torch.Tensor:
    """(rows, grid)."""
    every = Normal(normal.mean.repeat_interleave(len(GRID), 0), normal.std.repeat_interleave(len(GRID)))
    return every.log_prob(GRID.repeat(len(ROWS))[:, None], "sum").reshape(len(ROWS), -1)


def integral(values: torch.Tensor) -> torch.Tensor:
    return torch.trapezoid(values, GRID)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_density_integrates_to_one_and_has_the_moments_of_the_samples(law: Law) -> None:
    normal = step(law, 0.6)
    density = log_density(normal).exp()
    expect = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(integral(density), torch.ones(3).double(), **expect)
    mean = integral(GRID * density)
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64)
    samples = torch.stack([normal.sample(z.expand(3, 1))[:, 0] for z in noise])  # one std above and below the mean
    torch.testing.assert_close(mean, samples.mean(0), **expect)
    variance = integral((GRID - mean[:, None]) ** 2 * density)
    torch.testing.assert_close(variance, samples.var(0, correction=0), **expect)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_kl_is_the_integral(law: Law) -> None:
    policy, reference = step(law, 0.6), step(law, 0.5)
    own, other = log_density(policy), log_density(reference)
    torch.testing.assert_close(policy.kl(reference, "sum"), integral(own.exp() * (own - other)), rtol=1e-8, atol=1e-10)


def test_kl_of_the_flow_sde_is_that_of_the_flow_grpo_paper() -> None:
    """|ds| / 2 (c (1 - s) / (2 s) + 1 / c)^2 |v - v_ref|^2, c = a sqrt(s / (1 - s)), in nats."""
    s, next_s = SCHEDULE.sigma[ROWS[1:]], SCHEDULE.sigma[ROWS[1:] + 1]
    c = 0.7 * (s / (1 - s)).sqrt()
    expected = (s - next_s) / 2 * (c * (1 - s) / (2 * s) + 1 / c) ** 2 * (0.6 - 0.5) ** 2
    law = FlowSDE(FlowGRPONoise(0.7))
    torch.testing.assert_close(step(law, 0.6).kl(step(law, 0.5), "sum")[1:], expected, rtol=1e-12, atol=0)
