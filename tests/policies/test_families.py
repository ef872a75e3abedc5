"""What is particular to a family: what it is told beside the prompt, how it reads schedulers, what it refuses."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler

from diffalign.laws import DDIM
from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3, vae
from diffalign.policies.tiny_families import (
    BETAS,
    tiny_flux,
    tiny_lcm,
    tiny_pixart_alpha,
    tiny_qwen,
    tiny_sana,
    tiny_schnell,
    tiny_sd_turbo,
    tiny_sdxl,
)
from diffalign.rollout import rollout

ROWS = [(0, 0), (1, 0)]
PROMPTS = ["a bad dog", "a lake"]


def output(policy: Policy, guidance_scale: float, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    x = normal(policy.latent_shape(*size), seed=0, purpose="initial", rows=ROWS)
    level = policy.schedule(3, *size).level(1).expand(2)
    with torch.no_grad():
        return policy.predict(x, level, policy.encode(PROMPTS), guidance_scale).output


def test_sdxl_guides_away_from_zeros_or_from_the_empty_prompt_as_its_config_says() -> None:
    zeros, empty = (Policy.wrap(tiny_sdxl(force_zeros_for_empty_prompt=flag)) for flag in (True, False))
    assert not any(tensor.any() for tensor in zeros.unconditional(2).tensors.values())
    for name, tensor in empty.unconditional(2).tensors.items():
        assert torch.equal(tensor, empty.encode(["", ""]).tensors[name])
    noise = normal((4, 8, 8), seed=3, purpose="initial", rows=ROWS)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "latents": noise}
    expected = empty.pipe(PROMPTS, **call).images
    chain = {"rows": ROWS, "seed": 3, "guidance_scale": 4.0}
    found = rollout(empty, empty.encode(PROMPTS), DDIM(0.0), empty.schedule(2), **chain).latents
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def test_sdxl_is_told_the_size_of_the_image() -> None:
    policy = Policy.wrap(tiny_sdxl())
    told = []
    policy.denoiser.register_forward_pre_hook(
        lambda _, __, arguments: told.append(arguments["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    output(policy, 1.0, (16, 24))
    assert told == [[[16, 24, 0, 0, 16, 24]] * 2]


@pytest.mark.parametrize("build", [tiny_flux, tiny_lcm])
def test_distilled_models_embed_the_guidance_scale_in_one_evaluation(build) -> None:
    policy = Policy.wrap(build())
    assert policy.evaluations_per_prediction(7.0) == 1
    assert (output(policy, 7.0) - output(policy, 2.0)).abs().max() > 1e-4


def test_schnell_ignores_the_guidance_scale_and_the_image_size_as_its_pipeline_does() -> None:
    policy = Policy.wrap(tiny_schnell())
    assert torch.equal(output(policy, 7.0), output(policy, 0.0))
    assert policy.schedule(4, 16, 16).sigma.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(policy.schedule(4, 16, 16).sigma, policy.schedule(4, 32, 32).sigma)


def test_flux_dev_shifts_its_schedule_with_the_number_of_tokens() -> None:
    """Esser et al. 2024: sigma' = m sigma / (1 + (m - 1) sigma), with log m linear in the tokens."""
    policy = Policy.wrap(tiny_flux())
    for side in (16, 32):
        tokens = (side // 4) ** 2
        m = torch.tensor(0.5 + (1.15 - 0.5) * (tokens - 4) / (64 - 4), dtype=torch.float64).exp()
        sigma = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
        expected = m * sigma / (1 + (m - 1) * sigma)
        torch.testing.assert_close(policy.schedule(4, side, side).sigma, expected, rtol=1e-6, atol=0)


def test_fewer_tokens_of_a_long_prompt_are_the_pipelines() -> None:
    policy = Policy.wrap(tiny_flux())
    policy.set_max_sequence_length(7)
    expected, _, _ = policy.pipe.encode_prompt(["a lake"], None, max_sequence_length=7)
    assert torch.equal(policy.encode(["a lake"]).tensors["prompt_embeds"], expected)


def test_stable_diffusion_with_an_lcm_lora_has_the_timesteps_of_lcm() -> None:
    pipe = tiny_sd()
    pipe.scheduler = LCMScheduler(**BETAS)
    schedule = Policy.wrap(pipe).schedule(4)
    pipe.scheduler.set_timesteps(4)
    assert schedule.timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    assert schedule.target_sigma[-1] == 0
    assert torch.equal(schedule.target_sigma[:-1], schedule.sigma[1:-1])


def test_the_one_step_of_a_turbo_model_ends_at_x_0() -> None:
    schedule = Policy.wrap(tiny_sd_turbo()).schedule(1)
    assert schedule.timesteps.tolist() == [999]
    assert schedule.target_alpha.tolist() == [1]


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_sanas_solver_over_flow_sigmas_is_read_as_euler_with_its_shift(solver) -> None:
    pipe = tiny_sana()
    expected = Policy.wrap(pipe).schedule(5)
    pipe.scheduler = solver(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    found = Policy.wrap(pipe).schedule(5)
    assert torch.equal(found.sigma, expected.sigma)
    assert torch.equal(found.timesteps, expected.timesteps)


def sdxl_with(**settings) -> None:
    pipe = tiny_sdxl()
    pipe.vae = vae(**settings)
    Policy.wrap(pipe)


def lcm_with(**settings) -> None:
    pipe = tiny_lcm()
    pipe.scheduler = LCMScheduler(**(BETAS | settings))
    Policy.wrap(pipe).schedule(50)


def distilled_sana() -> None:
    pipe = tiny_sana()
    pipe.transformer.register_to_config(guidance_embeds=True)
    Policy.wrap(pipe)


def filling_flux() -> None:
    pipe = tiny_flux()
    pipe.transformer.register_to_config(in_channels=96)
    Policy.wrap(pipe)


def half_precision_vae() -> None:
    pipe = tiny_sdxl()
    pipe.vae.half()
    Policy.wrap(pipe)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (half_precision_vae, "overflows in float16 .*load the pipeline in bfloat16"),
        (lambda: sdxl_with(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents_mean and latents_std"),
        (lambda: lcm_with(timestep_scaling=1.0), "mixes 0.0007 of the state into x_0: take fewer than 50 steps"),
        (lambda: lcm_with(clip_sample=True), "clip_sample=True cannot be read"),
        (distilled_sana, "guidance_embeds=True, as Sana-Sprint.*use a Sana checkpoint"),
        (lambda: Policy.wrap(tiny_qwen()).schedule(1), "shift_terminal=0.1 and begin them at 1: use 2 steps or more"),
        (filling_flux, "reads 96 channels and packed latents have 16 .*use a text-to-image checkpoint"),
        (lambda: Policy.wrap(tiny_flux()).latent_shape(18, 16), "image side 18 is not a multiple of 4: use 16"),
        (lambda: Policy.wrap(tiny_pixart_alpha()).latent_shape(18, 16), "image side 18 is not a multiple of 4"),
        (lambda: Policy.wrap(tiny_flux()).set_max_sequence_length(513), "use 1 to 512"),
        (lambda: Policy.wrap(tiny_sdxl()).set_max_sequence_length(77), "leave it out"),
        (lambda: Policy.wrap(tiny_flux()).set_attention("xformers"), "would be ignored by FluxAttnProcessor"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_words(attempt, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attempt()


def test_the_adapters_of_pixart_leave_its_class_recognisable(tmp_path) -> None:
    pipe = tiny_pixart_alpha()
    mine = type(pipe.transformer)
    policy = Policy.wrap(pipe)
    assert isinstance(pipe.transformer, mine)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = Policy.from_pretrained(tmp_path)
    torch.testing.assert_close(output(again, 2.0), output(policy, 2.0), rtol=0, atol=1e-5)
    assert Policy.wrap(tiny_sd3()).lora_files is not policy.lora_files
