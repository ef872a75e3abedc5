"""Stable Diffusion 3 and 3.5."""

from torch import Tensor

from diffalign.laws import Schedule
from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.kinds import FlowPolicy
from diffalign.policies.lora import JOINT_ATTENTION
from diffalign.policies.tables import read_flow


@POLICIES.register("sd3")
class StableDiffusion3(FlowPolicy):
    """``StableDiffusion3Pipeline``: a joint-attention transformer over a rectified flow, predicting velocity.

    Departures from the pipeline: no skip-layer guidance, no image prompt, guidance combined in fp32.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    attention_modules = JOINT_ATTENTION

    max_sequence_length = 256  # of T5, the pipeline's default

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the shifted sigmas; under dynamic shifting they depend on the image size, as in the pipeline."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config, mu = self.pipe.scheduler.config, None
        if config.get("use_dynamic_shifting"):
            _, h, w = self.latent_shape(height, width)
            patch = self.denoiser.config.patch_size
            keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            mu = calculate_shift((h // patch) * (w // patch), *(config[key] for key in keys))
        return read_flow(self.pipe.scheduler, num_inference_steps, mu)

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) and ``pooled_prompt_embeds`` (1, width)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            [prompt],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer."""
        return self.called(
            hidden_states=x.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(self.dtype),
            pooled_projections=condition.tensors["pooled_prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]
