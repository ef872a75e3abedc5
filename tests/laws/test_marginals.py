"""Laws that claim to keep the marginals do, with the exact prediction of a Gaussian mixture; a wrong one does not."""

import pytest
import torch
from torch import Tensor

from diffalign.laws import (
    DDIM,
    DDPM,
    DanceGRPONoise,
    FlowGRPONoise,
    FlowODE,
    FlowSDE,
    Law,
    Level,
    Normal,
    Prediction,
    Schedule,
    Window,
    diffusion_schedule,
    flow_schedule,
)
from diffalign.noise import normal
from tests.laws.problems import Mixture

SAMPLES = 10_000
STEPS = 250
# 99.9 % quantile of the Kolmogorov distribution at this sample size, plus room for the error of 250 Euler steps.
BOUND = 1.95 / SAMPLES**0.5 + 0.005
DATA = Mixture.of([0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.3, 0.2, 0.4])


def ks_distance(x: Tensor, level: Level) -> float:
    """Kolmogorov-Smirnov distance between samples (B, 1) and the mixture's exact marginal at a level of one row."""
    points = x.flatten().sort().values
    variance = level.alpha**2 * DATA.stds**2 + level.sigma**2
    z = (points[:, None] - level.alpha * DATA.means) / variance.sqrt()
    cdf = (DATA.weights * torch.special.ndtr(z)).sum(1)
    rank = torch.arange(1, len(points) + 1, dtype=torch.float64) / len(points)
    return float((cdf - rank).abs().max())


def diffusion() -> Schedule:
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-5, 0.02, 2000, dtype=torch.float64), 0)
    stride = 2000 // STEPS
    return diffusion_schedule(alphas_cumprod, torch.arange(2000 - stride, -1, -stride), stride, 1.0)


def flow() -> Schedule:
    sigmas = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    return flow_schedule(sigmas, sigmas[:-1] * 1000)


def draw(purpose: str, step: int = 0) -> Tensor:
    return normal((SAMPLES, 1), seed=0, purpose=purpose, rows=[(0,)], step=step, dtype=torch.float64)[0]


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(DATA.weights, SAMPLES, replacement=True, generator=generator)
    return DATA.means[component, None] + DATA.stds[component, None] * draw("data")


def chain(law: Law, schedule: Schedule) -> list[Tensor]:
    """States (B, 1) of a chain that starts from the exact marginal of the first level."""
    start = schedule.level(0)
    states = [start.alpha * data() + start.sigma * draw("initial")]
    for i in range(len(schedule)):
        level, to = schedule.level(i).expand(SAMPLES), schedule.target(i).expand(SAMPLES)
        states.append(law.step(DATA.predict(states[-1], level), to).sample(draw("step", i)))
    return states


def worst_distance(law: Law, schedule: Schedule) -> float:
    """Largest KS distance to the exact marginal, at each quarter of the way."""
    states, n = chain(law, schedule), len(schedule)
    return max(ks_distance(states[i], schedule.target(i - 1)) for i in (n // 4, n // 2, 3 * n // 4, n))


@pytest.mark.parametrize(
    "law",
    [DDIM(0.0), DDIM(0.5), DDIM(1.0), DDPM("fixed_large"), Window(DDIM(1.0), diffusion(), 50, 150)],
    ids=repr,
)
def test_diffusion_laws_keep_the_marginals(law: Law) -> None:
    assert law.marginal_preserving
    assert worst_distance(law, diffusion()) < BOUND


@pytest.mark.parametrize(
    "law",
    [
        FlowODE(),
        FlowSDE(FlowGRPONoise(0.7)),
        FlowSDE(FlowGRPONoise(2**0.5)),
        FlowSDE(DanceGRPONoise(0.3)),
        FlowSDE(lambda s, _: 0.4 * s),
        DDIM(1.0),
    ],
    ids=["ode", "flow_grpo", "memoryless", "dance_grpo", "any_coefficient", "ancestral"],
)
def test_flow_laws_keep_the_marginals(law: Law) -> None:
    assert law.marginal_preserving
    assert worst_distance(law, flow()) < BOUND


def test_euler_plus_noise_is_no_law_and_the_test_sees_it() -> None:
    class EulerPlusNoise(FlowODE):
        def step(self, prediction: Prediction, to: Level) -> Normal:
            return Normal(super().step(prediction, to).mean, FlowSDE().std(prediction.level, to))

    assert worst_distance(EulerPlusNoise(), flow()) > 5 * BOUND


def test_only_the_memoryless_laws_forget_the_initial_noise() -> None:
    """Correlation of the first and last state; 10,000 pairs have a standard error of 0.01."""
    cases: list[tuple[Law, Schedule]] = [
        (DDIM(1.0), diffusion()),
        (DDIM(0.5), diffusion()),
        (DDPM("fixed_large"), diffusion()),
        (FlowSDE(FlowGRPONoise(2**0.5)), flow()),
        (FlowSDE(FlowGRPONoise(0.7)), flow()),
        (FlowODE(), flow()),
    ]
    for law, schedule in cases:
        states = chain(law, schedule)
        correlation = float(torch.corrcoef(torch.cat([states[0], states[-1]], 1).T)[0, 1])
        assert (abs(correlation) < 0.05) == law.memoryless, (law, correlation)
