"""Stable Diffusion XL, SDXL-Turbo and their distilled UNets."""

from functools import lru_cache

import torch
from torch import Tensor

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.sd import StableDiffusion


@POLICIES.register("sdxl")
class StableDiffusionXL(StableDiffusion):
    """``StableDiffusionXLPipeline``: a UNet that is also told the pooled prompt, the image's size and its crop.

    Size and target size are those of the image drawn, and nothing is cropped: the pipeline's defaults. The base model
    guides away from zeros instead of the empty prompt, where the pipeline's config says so. The ancestral Euler of
    SDXL-Turbo is ``DDIM(eta=1)``.

    Departures from the pipeline: no refiner, no watermark, no guidance rescale, guidance combined in fp32.
    """

    pipeline_class = "StableDiffusionXLPipeline"

    def check(self) -> None:
        """Refuse what :class:`StableDiffusion` refuses, and VAEs that overflow or rescale their latents."""
        super().check()
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            raise ValueError(
                "this VAE overflows in float16 (force_upcast=True): load the pipeline in bfloat16, or with a VAE made "
                "for float16, such as madebyollin/sdxl-vae-fp16-fix"
            )
        if vae.config.latents_mean is not None or vae.config.latents_std is not None:
            raise ValueError(
                "this VAE has latents_mean and latents_std, which only EDM models use: use a checkpoint over betas"
            )

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) and ``pooled_prompt_embeds`` (1, width)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt([prompt], device=self.device, do_classifier_free_guidance=False)
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def encode_unconditional(self) -> Condition:
        """Return zeros if the pipeline's config has ``force_zeros_for_empty_prompt``, else the empty prompt."""
        empty = super().encode_unconditional()
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        return Condition({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def added(self, x: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Return ``text_embeds`` (B, width) and ``time_ids`` (B, 6), the latter rounded as the pipeline does."""
        pooled = condition.tensors["pooled_prompt_embeds"]
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        ids = size_ids(height, width, x.device, pooled.dtype)
        return {"text_embeds": pooled.to(self.dtype), "time_ids": ids.expand(len(x), -1)}


@lru_cache
def size_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return original size, crop and target size, (1, 6), in pixels; Podell et al. 2023, arXiv 2307.01952."""
    return torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype)
