"""Laws against diffusers' samplers, stepped with the same noise, and against the papers' own forms."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from diffalign.laws import (
    CPS,
    DDIM,
    DDPM,
    Consistency,
    DanceGRPONoise,
    FlowODE,
    FlowSDE,
    Prediction,
    Schedule,
    diffusion_schedule,
    flow_schedule,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What diffusers draws from a generator of this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(scheduler, n: int, **settings: object) -> Schedule:
    """Set timesteps and float64 tables, and read them."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(n, **settings)
    return diffusion_schedule(scheduler.alphas_cumprod, scheduler.timesteps, None, 1.0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "n"), [("leading", 20), ("leading", 7), ("linspace", 30)])
def test_ddpm_steps_as_diffusers_does(variance: str, kind: str, spacing: str, n: int) -> None:
    scheduler = DDPMScheduler(
        **SD, clip_sample=False, variance_type=variance, prediction_type=kind, timestep_spacing=spacing
    )
    schedule = exact(scheduler, n)
    law = DDPM(variance)  # type: ignore[arg-type]
    for i, t in enumerate(scheduler.timesteps):
        x, output = draw(2, 4, seed=i), draw(2, 4, seed=i + 1)
        generator = torch.Generator().manual_seed(i + 2)
        expected = scheduler.step(output, t, x, generator=generator).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), kind)  # type: ignore[arg-type]
        step = law.step(prediction, schedule.target(i).expand(2))
        # diffusers' least variance is 1e-20, not 0.
        torch.testing.assert_close(step.sample(draw(2, 4, seed=i + 2)), expected, rtol=1e-10, atol=1e-9)
    assert law.stds(schedule)[-1] == 0


def test_ddpm_with_the_posterior_variance_is_ddim_at_eta_1() -> None:
    schedule = flow_schedule(torch.linspace(1, 0, 9), torch.arange(8))
    x, output, steps = draw(8, 3), draw(8, 3, seed=1), torch.arange(8)
    prediction, to = Prediction(output, x, schedule.level(steps), "velocity"), schedule.target(steps)
    small, ddim = DDPM().step(prediction, to), DDIM(1.0).step(prediction, to)
    torch.testing.assert_close(small.mean, ddim.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.std, ddim.std, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("n", [1, 4])
def test_the_ancestral_step_is_that_of_turbo_models(n: int) -> None:
    """diffusers steps x / alpha, in fp32, whose sigma is ours over alpha."""
    scheduler = EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    schedule = diffusion_schedule(table, scheduler.timesteps, None, 1.0)
    for i, t in enumerate(scheduler.timesteps):
        alpha, next_alpha = schedule.alpha[i], schedule.target_alpha[i]
        x, output = draw(2, 4, seed=i), draw(2, 4, seed=i + 1)
        scaled = (x / alpha).float()
        scheduler.scale_model_input(scaled, t)
        generator = torch.Generator().manual_seed(i + 2)
        expected = scheduler.step(output.float(), t, scaled, generator=generator).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), "epsilon")
        step = DDPM().step(prediction, schedule.target(i).expand(2))
        # diffusers' noise coefficient holds its own sigma; the last digits of ours differ by its fp32 tables.
        noise = draw(2, 4, seed=i + 2, dtype=torch.float32)
        torch.testing.assert_close((step.sample(noise) / next_alpha).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_consistency_steps_as_diffusers_lcm_does(kind: str, n: int) -> None:
    """Up to its boundary scalings, 1 / (400 t^2) of the state at timestep t; the last of eight is 139."""
    scheduler = LCMScheduler(**SD, prediction_type=kind, clip_sample=False)
    schedule = exact(scheduler, n, original_inference_steps=50)
    for i, t in enumerate(scheduler.timesteps):
        x, output = draw(2, 4, seed=i), draw(2, 4, seed=i + 1)
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i + 2)).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), kind)  # type: ignore[arg-type]
        step = Consistency().step(prediction, schedule.target(i).expand(2))
        bound = 3 / (400 * int(t) ** 2) + 1e-9
        torch.testing.assert_close(step.sample(draw(2, 4, seed=i + 2)), expected, rtol=bound, atol=bound)
    assert Consistency().stds(schedule)[-1] == 0


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        FlowMatchLCMScheduler(shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_consistency_on_a_flow_is_diffusers_stochastic_sampling(scheduler) -> None:
    scheduler.set_timesteps(6)
    schedule = flow_schedule(scheduler.sigmas, scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        x, output = (draw(2, 4, seed=i + k, dtype=torch.float32) for k in (0, 1))
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i + 2)).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), "velocity")
        noise = draw(2, 4, seed=i + 2, dtype=torch.float32)
        for law in (Consistency(), CPS(1.0)):
            sample = law.step(prediction, schedule.target(i).expand(2)).sample(noise)
            torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-6)


def test_cps_is_the_authors_step_and_the_ode_without_noise() -> None:
    """x' = (1 - s') (x - s v) + sqrt(s'^2 - std^2) (x + (1 - s) v) + std z, std = s' sin(pi eta / 2)."""
    schedule = flow_schedule(torch.linspace(1, 0, 9) ** 1.5, torch.arange(8))
    x, v, z = draw(8, 3), draw(8, 3, seed=1), draw(8, 3, seed=2)
    steps = torch.arange(8)
    prediction, to = Prediction(v, x, schedule.level(steps), "velocity"), schedule.target(steps)
    s, next_s = schedule.sigma[:-1, None], schedule.sigma[1:, None]
    std = next_s * math.sin(math.pi * 0.8 / 2)
    expected = (1 - next_s) * (x - s * v) + (next_s**2 - std**2).sqrt() * (x + (1 - s) * v) + std * z
    torch.testing.assert_close(CPS(0.8).step(prediction, to).sample(z), expected, rtol=1e-12, atol=1e-12)
    silent = CPS(0.0).step(prediction, to)
    torch.testing.assert_close(silent.mean, FlowODE().step(prediction, to).mean, rtol=1e-12, atol=1e-12)
    assert not silent.std.any()


def test_dance_grpo_is_its_score_form_and_the_ode_without_noise() -> None:
    """x' = x + (v - eta^2 / 2 score) (s' - s) + eta sqrt(s - s') z, score = -(x - (1 - s) x_0) / s^2."""
    schedule = flow_schedule(torch.linspace(1, 0, 9) ** 1.5, torch.arange(8))
    x, v, z = draw(8, 3), draw(8, 3, seed=1), draw(8, 3, seed=2)
    steps = torch.arange(8)
    prediction, to = Prediction(v, x, schedule.level(steps), "velocity"), schedule.target(steps)
    s, time = schedule.sigma[:-1, None], schedule.sigma.diff()[:, None]
    score = -(x - (1 - s) * (x - s * v)) / s**2
    expected = x + (v - 0.5 * 0.3**2 * score) * time + 0.3 * (-time).sqrt() * z
    law = FlowSDE(DanceGRPONoise(0.3))
    torch.testing.assert_close(law.step(prediction, to).sample(z), expected, rtol=1e-12, atol=1e-12)
    silent = FlowSDE(DanceGRPONoise(0.0)).step(prediction, to)
    assert torch.equal(silent.mean, FlowODE().step(prediction, to).mean)
    assert not silent.std.any()
