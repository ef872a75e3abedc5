"""FLUX.1 dev and schnell."""

from functools import lru_cache

import torch
from torch import Tensor

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.packed import PackedFlow


@POLICIES.register("flux")
class Flux(PackedFlow):
    """``FluxPipeline``: a joint-attention transformer that embeds the guidance scale (dev) or ignores it (schnell).

    A prediction is always one evaluation.

    Departures from the pipeline: no true classifier-free guidance (``true_cfg_scale``), no image prompt.
    """

    pipeline_class = "FluxPipeline"
    max_sequence_length = 512  # of T5, the pipeline's default; schnell was trained with 256

    def check(self) -> None:
        """Refuse schedulers that cannot be read, and transformers that need an image."""
        super().check()
        channels, read = self.pipe.vae.config.latent_channels, self.denoiser.config.in_channels
        if read != 4 * channels:
            raise ValueError(
                f"this transformer reads {read} channels and packed latents have {4 * channels} (fill, control or "
                "depth): use a text-to-image checkpoint"
            )

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

    def evaluate_tokens(self, tokens: Tensor, sides: tuple[int, int], time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer."""
        embeds = condition.tensors["prompt_embeds"].to(self.dtype)
        return self.called(
            hidden_states=tokens,
            timestep=time,
            guidance=condition.tensors.get("guidance"),
            pooled_projections=condition.tensors["pooled_prompt_embeds"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids(*sides, tokens.device),
            return_dict=False,
        )[0]


@lru_cache
def image_ids(h: int, w: int, device: torch.device) -> Tensor:
    """Return (0, row, column) of every token, (h w, 3)."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (1, h, w)]
    return torch.cartesian_prod(*axes)
