"""Stable Diffusion 1.x and 2.x."""

from torch import Tensor

from diffalign.laws import PredictionKind, Schedule
from diffalign.policies.base import POLICIES, Policy, logger
from diffalign.policies.condition import Condition
from diffalign.policies.tables import as_ddim, read_diffusion


@POLICIES.register("sd")
class StableDiffusion(Policy):
    """``StableDiffusionPipeline``: a UNet over DDIM's tables, predicting epsilon, v or the sample.

    Departures from the pipeline: no guidance rescale, no safety checker, guidance combined in fp32.
    """

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    attention_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def check(self) -> None:
        """Refuse UNets that need more than a latent and a prompt, and schedulers without tables."""
        config = self.denoiser.config
        if config.time_cond_proj_dim is not None:
            raise ValueError(
                "this UNet embeds the guidance scale (distilled, as LCM): use the model it was distilled from"
            )
        channels = self.pipe.vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"this UNet reads {config.in_channels} channels and latents have {channels} (inpainting or image "
                "variation): use a text-to-image checkpoint"
            )
        as_ddim(self.pipe.scheduler)
        name = type(self.pipe.scheduler).__name__
        if name != "DDIMScheduler":
            logger.info("%s is read as DDIMScheduler over the same betas; policies step by DDIM", name)

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the DDIM levels; they do not depend on the image size."""
        return read_diffusion(self.pipe.scheduler, num_inference_steps)

    def prediction_kind(self) -> PredictionKind:
        """Return the scheduler's prediction type."""
        return self.pipe.scheduler.config.get("prediction_type", "epsilon")

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width)."""
        embeds, _ = self.pipe.encode_prompt([prompt], self.device, 1, False)
        return Condition({"prompt_embeds": embeds})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the UNet."""
        embeds = condition.tensors["prompt_embeds"].to(self.dtype)
        return self.called(x.to(self.dtype), timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def unscale(self, latents: Tensor) -> Tensor:
        """Divide by the VAE's scaling factor."""
        return latents / self.pipe.vae.config.scaling_factor
