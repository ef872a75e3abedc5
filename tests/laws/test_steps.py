"""Predictions, schedules and laws against the formulas of the papers and against diffusers' own schedulers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

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
    Prediction,
    Schedule,
    Window,
    default_law,
    diffusion_schedule,
    flow_schedule,
)


def ddim_pair(n: int, **config: object) -> tuple[DDIMScheduler, Schedule]:
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = DDIMScheduler(**(settings | {"set_alpha_to_one": False, "steps_offset": 1} | config))
    # With its tables in fp32 diffusers loses digits in 1 - alpha_t / alpha_s; in float64 its own code is exact.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(n)
    stride = scheduler.config.num_train_timesteps // n
    tables = (scheduler.alphas_cumprod, scheduler.timesteps, stride, scheduler.final_alpha_cumprod)
    return scheduler, diffusion_schedule(*tables)


def flow_pair(n: int, shift: float = 3.0) -> tuple[FlowMatchEulerDiscreteScheduler, Schedule]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    return scheduler, flow_schedule(scheduler.sigmas, scheduler.timesteps)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity"])
def test_every_parameterisation_gives_back_what_made_the_state(kind: str) -> None:
    x0, noise = draw(6, 2, 3), draw(6, 2, 3, seed=1)
    _, schedule = flow_pair(6) if kind == "velocity" else ddim_pair(6)
    level = schedule.level(torch.arange(6))
    alpha, sigma = level.alpha.reshape(6, 1, 1), level.sigma.reshape(6, 1, 1)
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "velocity": noise - x0}[kind]
    prediction = Prediction(output, alpha * x0 + sigma * noise, level, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prediction.noise, noise, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prediction.velocity, noise - x0, rtol=1e-11, atol=1e-11)


def test_a_low_precision_output_is_raised_before_it_is_used() -> None:
    _, schedule = flow_pair(4)
    output, x = draw(1, 8).bfloat16(), draw(1, 8).float()
    prediction = Prediction(output, x, schedule.level(1), "velocity")
    assert prediction.x0.dtype == torch.float32
    expected = x - schedule.level(1).sigma.float() * output.float()
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "n"), [("leading", 20), ("leading", 7), ("trailing", 20), ("trailing", 30)])
def test_ddim_steps_as_diffusers_does(eta: float, kind: str, spacing: str, n: int) -> None:
    scheduler, schedule = ddim_pair(n, prediction_type=kind, timestep_spacing=spacing)
    law = DDIM(eta)
    stds = law.stds(schedule)
    for i, t in enumerate(scheduler.timesteps):
        x, output, noise = draw(2, 4, seed=i), draw(2, 4, seed=i + 1), draw(2, 4, seed=i + 2)
        expected = scheduler.step(output, int(t), x, eta=eta, variance_noise=noise).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), kind)  # type: ignore[arg-type]
        step = law.step(prediction, schedule.target(i).expand(2))
        torch.testing.assert_close(step.sample(noise), expected, rtol=1e-10, atol=1e-10)
        assert step.std[0].item() == stds[i].item()


def test_ddim_with_zero_terminal_snr() -> None:
    scheduler, schedule = ddim_pair(
        10, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    assert schedule.alpha[0] == 0
    x, output = draw(2, 4), draw(2, 4, seed=1)
    prediction = Prediction(output, x, schedule.level(0).expand(2), "v_prediction")
    step = DDIM(0.0).step(prediction, schedule.target(0).expand(2))
    expected = scheduler.step(output, int(scheduler.timesteps[0]), x).prev_sample
    torch.testing.assert_close(step.mean, expected, rtol=1e-10, atol=1e-10)


def test_flow_ode_and_the_silent_sde_equal_diffusers_bit_for_bit() -> None:
    scheduler, schedule = flow_pair(10)
    for i, t in enumerate(scheduler.timesteps):
        x, output = draw(2, 4, seed=i).float(), draw(2, 4, seed=i + 1).float()
        expected = scheduler.step(output, t, x).prev_sample
        prediction = Prediction(output, x, schedule.level(i).expand(2), "velocity")
        for law in (FlowODE(), FlowSDE(FlowGRPONoise(0.0))):
            step = law.step(prediction, schedule.target(i).expand(2))
            assert torch.equal(step.mean, expected)
            assert not step.std.any()


def test_ddim_on_a_flow_is_the_ode_at_eta_0_and_the_posterior_at_eta_1() -> None:
    _, schedule = flow_pair(6)
    x, output = draw(4, 3), draw(4, 3, seed=1)
    at, to = schedule.level(torch.arange(4)), schedule.target(torch.arange(4))
    prediction = Prediction(output, x, at, "velocity")
    torch.testing.assert_close(DDIM(0).step(prediction, to).mean, FlowODE().step(prediction, to).mean)
    # Bayes: x_t = (alpha_t / alpha_s) x_s + rest, x_s ~ N(alpha_s x_0, sigma_s^2).
    slope = at.alpha / to.alpha
    rest = at.sigma**2 - slope**2 * to.sigma**2
    variance = 1 / (1 / to.sigma**2 + slope**2 / rest)
    mean = variance[:, None] * ((to.alpha / to.sigma**2)[:, None] * prediction.x0 + (slope / rest)[:, None] * x)
    step = DDIM(1).step(prediction, to)
    torch.testing.assert_close(step.std, variance.sqrt())
    torch.testing.assert_close(step.mean, mean)


def test_flow_sde_stds_are_those_of_flow_grpo() -> None:
    """a sqrt(s / (1 - s)) sqrt(s - s') from the sigmas alone; at s = 1 the next sigma stands in."""
    scheduler, schedule = flow_pair(10)
    sigmas = scheduler.sigmas.double().numpy()
    inner = np.where(sigmas == 1, sigmas[1], sigmas)
    expected = 0.7 * np.sqrt(sigmas / (1 - inner))[:-1] * np.sqrt(-np.diff(sigmas))
    np.testing.assert_allclose(FlowSDE().stds(schedule).numpy(), expected, rtol=1e-12)
    assert FlowODE().stds(schedule).tolist() == [0.0] * 10


@pytest.mark.parametrize(
    ("law", "kind"),
    [
        (DDIM(0.7), "epsilon"),
        (DDPM("fixed_large"), "epsilon"),
        (CPS(0.7), "velocity"),
        (Consistency(), "epsilon"),
        (FlowSDE(), "velocity"),
        (FlowSDE(DanceGRPONoise()), "velocity"),
        (FlowODE(), "velocity"),
        (DDIM(1.0), "velocity"),
        (Window(FlowSDE(), flow_pair(8)[1], 3, 7), "velocity"),
    ],
    ids=repr,
)
def test_rows_may_stand_at_different_times(law: object, kind: str) -> None:
    _, schedule = ddim_pair(8) if kind == "epsilon" else flow_pair(8)
    x, output, noise = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    index = torch.tensor([6, 0, 3, 7])
    together = law.step(Prediction(output, x, schedule.level(index), kind), schedule.target(index))  # type: ignore
    for row, i in enumerate(index.tolist()):
        alone = law.step(  # type: ignore[attr-defined]
            Prediction(output[row : row + 1], x[row : row + 1], schedule.level(i), kind),  # type: ignore[arg-type]
            schedule.target(i),
        )
        assert torch.equal(together.sample(noise)[row], alone.sample(noise[row : row + 1])[0])


def test_levels_select_and_expand() -> None:
    _, schedule = flow_pair(4)
    level = schedule.level(torch.arange(5))
    picked = level.rows(torch.tensor([3, 1]))
    assert torch.equal(picked.sigma, schedule.sigma[[3, 1]])
    one: Level = level.rows(slice(2, 3)).expand(6)
    assert len(one) == 6
    assert torch.equal(one.timestep, schedule.timesteps[2].expand(6))
    assert level.timestep[4] == 0


def test_default_laws() -> None:
    assert repr(default_law("diffusion", 0.3)) == "DDIM(eta=0.3)"
    assert repr(default_law("flow")) == "FlowODE()"
    assert repr(default_law("flow", 0.7)) == "FlowSDE(FlowGRPONoise(a=0.7))"


def test_noise_levels_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eta = 1\.5 is outside \[0, 1\]"):
        DDIM(1.5)
    with pytest.raises(ValueError, match=r"a = -0\.1 is negative"):
        FlowGRPONoise(-0.1)
    with pytest.raises(ValueError, match=r"eta = -0\.1 is negative"):
        DanceGRPONoise(-0.1)
    with pytest.raises(ValueError, match=r"CPS eta = 1\.2 is outside \[0, 1\]"):
        CPS(1.2)
    with pytest.raises(ValueError, match="variance 'learned' is unknown: use 'fixed_small'"):
        DDPM("learned")  # type: ignore[arg-type]


def test_a_law_of_flows_refuses_a_diffusion_schedule() -> None:
    with pytest.raises(ValueError, match=r"FlowODE\(\) is no law of a diffusion schedule.*default_law\('diffusion'"):
        FlowODE().stds(ddim_pair(4)[1])


@pytest.mark.parametrize("law", [DDIM(0.7), DDPM(), CPS(0.7), Consistency(), FlowSDE(), FlowSDE(DanceGRPONoise())])
def test_a_law_keeps_float64_and_raises_bf16_to_fp32(law: Law) -> None:
    _, schedule = flow_pair(4)
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        prediction = Prediction(draw(1, 8).to(given), draw(1, 8).to(given), schedule.level(1), "velocity")
        assert law.step(prediction, schedule.target(1)).mean.dtype == expected
