"""Stable Diffusion 1.x and 2.x, and SD-Turbo."""

import torch
from torch import Tensor

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.kinds import DiffusionPolicy


@POLICIES.register("sd")
class StableDiffusion(DiffusionPolicy):
    """``StableDiffusionPipeline``: a UNet over DDIM's tables, predicting epsilon, v or the sample.

    A distilled UNet, which embeds the guidance scale, is told it and evaluated once.

    Departures from the pipeline: no guidance rescale, no safety checker, guidance combined in fp32. Other schedulers
    are read as DDIM over their betas. For the few steps of SD-Turbo that is Euler's own chain, but for its start: Euler
    begins with the noise times the first sigma (0.998 for these betas), a policy with the noise itself.
    """

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    attention_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def check(self) -> None:
        """Refuse UNets that need more than a latent and a prompt, and schedulers without tables."""
        config = self.denoiser.config
        channels = self.pipe.vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"this UNet reads {config.in_channels} channels and latents have {channels} (inpainting or image "
                "variation): use a text-to-image checkpoint"
            )
        super().check()

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width)."""
        embeds, _ = self.pipe.encode_prompt([prompt], self.device, 1, False)
        return Condition({"prompt_embeds": embeds})

    def evaluations_per_prediction(self, guidance_scale: float) -> int:
        """Return 1 for a distilled UNet, which embeds the guidance scale, else as any policy."""
        distilled = self.denoiser.config.time_cond_proj_dim is not None
        return 1 if distilled else super().evaluations_per_prediction(guidance_scale)

    def embed_guidance(self, condition: Condition, guidance_scale: float) -> Condition:
        """Add ``timestep_cond`` (B, width) for a distilled UNet (Meng et al. 2023; LCM, Luo et al. 2023)."""
        width = self.denoiser.config.time_cond_proj_dim
        if width is None:
            return condition
        embedding = self.pipe.get_guidance_scale_embedding(torch.tensor([guidance_scale - 1.0]), width)
        rows = embedding.to(condition.device).expand(len(condition), -1)
        return Condition(condition.tensors | {"timestep_cond": rows})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the UNet."""
        embeds = condition.tensors["prompt_embeds"].to(self.dtype)
        guidance = condition.tensors.get("timestep_cond")
        return self.called(
            x.to(self.dtype),
            timestep,
            encoder_hidden_states=embeds,
            timestep_cond=None if guidance is None else guidance.to(self.dtype),
            added_cond_kwargs=self.added(x, condition),
            return_dict=False,
        )[0]

    def added(self, x: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """Return what the UNet is told beside the prompt's tokens, as its ``added_cond_kwargs``."""
        return None
