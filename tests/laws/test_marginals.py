"""Laws that claim to keep the marginals do, with the exact prediction of a Gaussian mixture; a wrong one does not."""

import pytest
import torch
from torch import Tensor

from diffalign.laws import (
    DDIM,
    FlowGRPONoise,
    FlowODE,
    FlowSDE,
    Law,
    Level,
    Normal,
    Prediction,
    Schedule,
    diffusion_schedule,
    flow_schedule,
)
from diffalign.noise import normal

SAMPLES = 10_000
STEPS = 250
# 99.9 % quantile of the Kolmogorov distribution at this sample size, plus room for the error of 250 Euler steps.
BOUND = 1.95 / SAMPLES**0.5 + 0.005
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)


def predict(x: Tensor, level: Level) -> Prediction:
    """The posterior mean of x_0 given x = alpha x_0 + sigma noise, rows of shape (B, 1)."""
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    variance = alpha**2 * STDS**2 + sigma**2
    log_weight = WEIGHTS.log() - 0.5 * (x - alpha * MEANS) ** 2 / variance - 0.5 * variance.log()
    component_mean = MEANS + alpha * STDS**2 / variance * (x - alpha * MEANS)
    x0 = (log_weight.softmax(1) * component_mean).sum(1, keepdim=True)
    return Prediction(x0, x, level, "sample")


def ks_distance(x: Tensor, level: Level) -> float:
    """Kolmogorov-Smirnov distance between samples (B, 1) and the mixture's exact marginal at a level of one row."""
    points = x.flatten().sort().values
    variance = level.alpha**2 * STDS**2 + level.sigma**2
    z = (points[:, None] - level.alpha * MEANS) / variance.sqrt()
    cdf = (WEIGHTS * torch.special.ndtr(z)).sum(1)
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
    component = torch.multinomial(WEIGHTS, SAMPLES, replacement=True, generator=generator)
    return MEANS[component, None] + STDS[component, None] * draw("data")


def chain(law: Law, schedule: Schedule) -> list[Tensor]:
    """States (B, 1) of a chain that starts from the exact marginal of the first level."""
    start = schedule.level(0)
    states = [start.alpha * data() + start.sigma * draw("initial")]
    for i in range(len(schedule)):
        level, to = schedule.level(i).expand(SAMPLES), schedule.target(i).expand(SAMPLES)
        states.append(law.step(predict(states[-1], level), to).sample(draw("step", i)))
    return states


def worst_distance(law: Law, schedule: Schedule) -> float:
    """Largest KS distance to the exact marginal, at each quarter of the way."""
    states, n = chain(law, schedule), len(schedule)
    return max(ks_distance(states[i], schedule.target(i - 1)) for i in (n // 4, n // 2, 3 * n // 4, n))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals(eta: float) -> None:
    assert DDIM(eta).marginal_preserving
    assert worst_distance(DDIM(eta), diffusion()) < BOUND


@pytest.mark.parametrize(
    "law",
    [FlowODE(), FlowSDE(FlowGRPONoise(0.7)), FlowSDE(FlowGRPONoise(2**0.5)), FlowSDE(lambda s, _: 0.4 * s), DDIM(1.0)],
    ids=["ode", "flow_grpo", "memoryless", "any_coefficient", "ancestral"],
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
        (FlowSDE(FlowGRPONoise(2**0.5)), flow()),
        (FlowSDE(FlowGRPONoise(0.7)), flow()),
        (FlowODE(), flow()),
    ]
    for law, schedule in cases:
        states = chain(law, schedule)
        correlation = float(torch.corrcoef(torch.cat([states[0], states[-1]], 1).T)[0, 1])
        assert (abs(correlation) < 0.05) == law.memoryless, (law, correlation)
