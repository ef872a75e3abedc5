"""FLUX.1 dev and schnell."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.laws import PredictionKind, Schedule
from diffalign.policies.base import POLICIES, Policy
from diffalign.policies.condition import Condition
from diffalign.policies.lora import JOINT_ATTENTION
from diffalign.policies.tables import as_flow_euler, read_flow


@POLICIES.register("flux")
class Flux(Policy):
    """``FluxPipeline``: a joint-attention transformer over a rectified flow, on latents packed 2 x 2 into tokens.

    The guidance scale is embedded (dev) or ignored (schnell): a prediction is always one evaluation. States are
    unpacked; packing is this class's own business.

    Departures from the pipeline: no true classifier-free guidance (``true_cfg_scale``), no image prompt.
    """

    pipeline_class = "FluxPipeline"
    denoiser_name = "transformer"
    attention_modules = JOINT_ATTENTION

    patch_size = 2
    max_sequence_length = 512  # of T5, the pipeline's default

    def check(self) -> None:
        """Refuse schedulers that cannot be read, and transformers that need an image."""
        channels, read = self.pipe.vae.config.latent_channels, self.denoiser.config.in_channels
        if read != 4 * channels:
            raise ValueError(
                f"this transformer reads {read} channels and packed latents have {4 * channels} (fill, control or "
                "depth): use a text-to-image checkpoint"
            )
        as_flow_euler(self.pipe.scheduler)

    @property
    def latent_channels(self) -> int:
        """Channels of the unpacked state."""
        return self.denoiser.config.in_channels // 4

    @property
    def sample_size(self) -> int:
        """The latent's side by default; the transformer has none of its own."""
        return self.pipe.default_sample_size

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the sigmas, shifted by the number of tokens where the scheduler shifts dynamically (dev)."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        _, h, w = self.latent_shape(height, width)
        config = self.pipe.scheduler.config
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(h * w // 4, *(config[key] for key in keys))
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return read_flow(self.pipe.scheduler, num_inference_steps, mu, sigmas)

    def prediction_kind(self) -> PredictionKind:
        """Return "velocity"."""
        return "velocity"

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) of T5 and ``pooled_prompt_embeds`` (1, width) of CLIP."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            [prompt], None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def evaluations_per_prediction(self, guidance_scale: float) -> int:
        """Return 1, whatever the guidance scale."""
        return 1

    def embed_guidance(self, condition: Condition, guidance_scale: float) -> Condition:
        """Add ``guidance`` (B,) for a transformer that embeds it."""
        if not self.denoiser.config.guidance_embeds:
            return condition
        scale = torch.full((len(condition),), guidance_scale, device=condition.device)
        return Condition(condition.tensors | {"guidance": scale})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer on packed tokens, channel by channel of each 2 x 2 patch."""
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        embeds = condition.tensors["prompt_embeds"].to(self.dtype)
        tokens = self.called(
            hidden_states=pixel_unshuffle(x.to(self.dtype), 2).flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=condition.tensors.get("guidance"),
            pooled_projections=condition.tensors["pooled_prompt_embeds"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids(h, w, x.device),
            return_dict=False,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h, w)), 2)

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo the VAE's scale and shift."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + config.shift_factor


@lru_cache
def image_ids(h: int, w: int, device: torch.device) -> Tensor:
    """Return (0, row, column) of every token, (h w, 3)."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (1, h, w)]
    return torch.cartesian_prod(*axes)
