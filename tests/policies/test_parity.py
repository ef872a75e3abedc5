"""Deterministic rollouts equal the pipelines' own samples from the same noise; policies leave the pipeline alone."""

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from diffalign.laws import DDIM, FlowGRPONoise, FlowODE, FlowSDE, Law
from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import rollout

PROMPTS = ["a bad dog", "a fine lake"]
ROWS = [(0, 0), (1, 0)]


def pipeline_latents(pipe, steps: int, guidance_scale: float, dtype=torch.float32, **arguments) -> torch.Tensor:
    noise = normal((4, 8, 8), seed=3, purpose="initial", rows=ROWS, dtype=dtype)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    return pipe(PROMPTS, latents=noise, **call, **arguments).images


def policy_latents(pipe, steps: int, guidance_scale: float, law: Law) -> torch.Tensor:
    policy = Policy.wrap(pipe)
    condition = policy.encode(PROMPTS)
    schedule = policy.schedule(steps)
    return rollout(policy, condition, law, schedule, rows=ROWS, seed=3, guidance_scale=guidance_scale).latents


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("spacing", "steps", "guidance_scale"), [("leading", 6, 4.0), ("trailing", 7, 4.0), ("linspace", 4, 1.0)]
)
def test_sd_at_eta_0_equals_its_pipeline(kind: str, spacing: str, steps: int, guidance_scale: float) -> None:
    pipe = tiny_sd(prediction_type=kind, timestep_spacing=spacing)
    expected = pipeline_latents(pipe, steps, guidance_scale)
    found = policy_latents(pipe, steps, guidance_scale, DDIM(0.0))
    assert torch.isfinite(expected).all()
    # From x_0 the noise is a difference divided by a small sigma, which amplifies rounding at the last steps.
    bound = (2e-5 if kind == "sample" else 5e-6) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("law", "shift", "guidance_scale"),
    [(FlowODE(), 1.0, 4.0), (FlowODE(), 3.0, 0.5), (FlowSDE(FlowGRPONoise(0.0)), 3.0, 4.0)],
)
def test_sd3_without_noise_equals_its_pipeline(law: Law, shift: float, guidance_scale: float) -> None:
    pipe = tiny_sd3(shift=shift)
    expected = pipeline_latents(pipe, 6, guidance_scale)
    found = policy_latents(pipe, 6, guidance_scale, law)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * scale)


def test_sd3_with_dynamic_shifting_equals_its_pipeline() -> None:
    pipe = tiny_sd3(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    expected = pipeline_latents(pipe, 6, 3.0)
    found = policy_latents(pipe, 6, 3.0, FlowODE())
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def test_float64_agrees_to_the_precision_of_the_scheduler_tables() -> None:
    """In float64 what is left is the fp32 rounding of the coefficients inside diffusers' DDIM step."""
    pipe = tiny_sd(torch.float64)
    expected = pipeline_latents(pipe, 10, 4.0, torch.float64)
    found = policy_latents(pipe, 10, 4.0, DDIM(0.0))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_pixels_equal_the_pipelines(build) -> None:
    pipe = build()
    policy = Policy.wrap(pipe)
    latents = normal((4, 8, 8), seed=0, purpose="initial", rows=ROWS)
    decoded = pipe.vae.decode(policy.unscale(latents), return_dict=False)[0]
    expected = pipe.image_processor.postprocess(decoded.detach(), output_type="pt")
    assert torch.equal(policy.decode(latents), expected)
    torch.testing.assert_close(policy.decode(latents, micro_batch_size=1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_the_whole_way_to_pixels_equals_the_pipeline(build) -> None:
    pipe = build()
    noise = normal((4, 8, 8), seed=3, purpose="initial", rows=ROWS)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt", "latents": noise}
    expected = pipe(PROMPTS, **call).images
    law = DDIM(0.0) if build is tiny_sd else FlowODE()
    found = Policy.wrap(pipe).decode(policy_latents(pipe, 5, 3.0, law))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(pipe(PROMPTS, **call).images, expected), "wrapping changed the pipeline"


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda c: PNDMScheduler.from_config(c, skip_prk_steps=True),
        DPMSolverMultistepScheduler.from_config,
        EulerDiscreteScheduler.from_config,
    ],
    ids=["pndm", "dpm", "euler"],
)
def test_other_diffusion_schedulers_are_read_as_ddim_and_left_alone(scheduler, caplog) -> None:
    pipe = tiny_sd()
    ddim = pipe.scheduler
    expected = pipeline_latents(pipe, 5, 3.0)
    pipe.scheduler = scheduler(ddim.config)
    mine = pipe.scheduler
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(mine).items()}
    with caplog.at_level(logging.INFO, logger="diffalign"):
        found = policy_latents(pipe, 5, 3.0, DDIM(0.0))
    assert f"{type(mine).__name__} is read as DDIMScheduler" in caplog.text
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * expected.abs().max().item())
    assert pipe.scheduler is mine
    for name, value in vars(mine).items():
        np.testing.assert_array_equal(value, before[name], err_msg=f"{name} of the user's scheduler changed")


def test_the_tables_of_sd_1_5_are_honoured() -> None:
    """Its config: PNDM, clip_sample False, steps_offset 1, set_alpha_to_one False."""
    pipe = tiny_sd()
    pipe.scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    schedule = Policy.wrap(pipe).schedule(50)
    assert schedule.timesteps[:3].tolist() == [981.0, 961.0, 941.0]
    assert schedule.timesteps[-1] == 1
    first = pipe.scheduler.alphas_cumprod[0].double()
    torch.testing.assert_close(schedule.alpha[-1] ** 2, first, rtol=1e-15, atol=0)


def zero_snr_epsilon():
    pipe = tiny_sd(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return Policy.wrap(pipe).schedule(10)


def with_scheduler(build, scheduler):
    pipe = build()
    pipe.scheduler = scheduler
    return Policy.wrap(pipe)


KNOWN = (
    "FluxPipeline, LatentConsistencyModelPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, QwenImagePipeline, "
    "SanaPipeline, StableDiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline"
)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (
            lambda: with_scheduler(tiny_sd, DDIMScheduler(clip_sample=True)),
            "clip_sample=True cannot be read.*from_config",
        ),
        (lambda: with_scheduler(tiny_sd, DDIMScheduler(clip_sample=False, thresholding=True)), "thresholding=True"),
        (lambda: with_scheduler(tiny_sd, FlowMatchEulerDiscreteScheduler()), "not a diffusion scheduler over betas"),
        (lambda: with_scheduler(tiny_sd3, DDIMScheduler()), "DDIMScheduler is not read: set pipe.scheduler"),
        (
            lambda: with_scheduler(tiny_sd3, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
            "stochastic_sampling=True",
        ),
        (zero_snr_epsilon, "zero terminal SNR"),
        (lambda: Policy.wrap(object()), f"pipeline object belongs to no known family: use one of {KNOWN}$"),
        (lambda: Policy.wrap(tiny_sd()).latent_shape(15, 16), "image side 15 is not a multiple of 2: use 16"),
        (lambda: Policy.wrap(tiny_sd3()).latent_shape(18, 16), "image side 18 is not a multiple of 4"),
        (lambda: Policy.from_pretrained("nowhere", dtype="int8"), "dtype 'int8' is not a floating type"),
        (lambda: Policy.wrap(tiny_sd()).encode("a dog"), "not a list of prompts"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_words(attempt, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attempt()


def test_a_subclass_of_a_pipeline_is_driven_by_its_family() -> None:
    pipe = tiny_sd()
    pipe.__class__ = type("MyPipeline", (type(pipe),), {})
    assert type(Policy.wrap(pipe)).__name__ == "StableDiffusion"


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_a_saved_pipeline_is_loaded_from_its_folder(build, tmp_path) -> None:
    pipe = build()
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    policy = Policy.from_pretrained(tmp_path, dtype="bfloat16")
    assert policy.dtype == torch.bfloat16
    again = Policy.from_pretrained(tmp_path)
    mine = Policy.wrap(pipe)
    law = DDIM(0.0) if build is tiny_sd else FlowODE()
    arguments = {"rows": ROWS, "seed": 0, "guidance_scale": 2.0}
    first = rollout(mine, mine.encode(PROMPTS), law, mine.schedule(2), **arguments).latents
    second = rollout(again, again.encode(PROMPTS), law, again.schedule(2), **arguments).latents
    # Memory-mapped weights are aligned otherwise, and a kernel may round otherwise for it.
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
