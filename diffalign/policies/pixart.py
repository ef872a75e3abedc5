"""PixArt-alpha and PixArt-Sigma."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.kinds import DiffusionPolicy


@POLICIES.register("pixart-alpha")
class PixArtAlpha(DiffusionPolicy):
    """``PixArtAlphaPipeline``: a cross-attention transformer over DDIM's tables, told the image's size at 1024 pixels.

    diffusers gives this transformer no adapters and its pipelines no loader of LoRA files; here the transformer's class
    gains the adapters of diffusers' other transformers, and files have their format. Load one by ``load_lora``.

    Departures from the pipeline: an image has the size that is asked for (``use_resolution_binning=False``), prompts
    are put in lower case and not cleaned (``clean_caption=False``), guidance is combined in fp32.
    """

    pipeline_class = "PixArtAlphaPipeline"
    denoiser_name = "transformer"
    attention_modules = ("to_q", "to_k", "to_v", "to_out.0")

    max_sequence_length = 120  # of T5, the pipeline's default

    def __init__(self, pipe: Any) -> None:
        pipe.transformer.__class__ = with_adapters(type(pipe.transformer))
        super().__init__(pipe)

    @property
    def lora_files(self) -> Any:
        """The reader and writer of another transformer, which knows nothing of its layers."""
        from diffusers.loaders import SD3LoraLoaderMixin

        return SD3LoraLoaderMixin

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) and ``prompt_attention_mask`` (1, tokens)."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            [prompt], False, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Condition({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer; a variance that it learned is left out."""
        embeds = condition.tensors["prompt_embeds"]
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        size, aspect = size_conditions(height, width, x.device, embeds.dtype)
        told = self.denoiser.use_additional_conditions
        output = self.called(
            x.to(self.dtype),
            encoder_hidden_states=embeds.to(self.dtype),
            encoder_attention_mask=condition.tensors["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs={
                "resolution": size.expand(len(x), -1) if told else None,
                "aspect_ratio": aspect.expand(len(x), -1) if told else None,
            },
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


@POLICIES.register("pixart-sigma")
class PixArtSigma(PixArtAlpha):
    """``PixArtSigmaPipeline``: the same with longer prompts."""

    pipeline_class = "PixArtSigmaPipeline"
    max_sequence_length = 300


@lru_cache
def size_conditions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return height and width in pixels (1, 2) and their ratio (1, 1), rounded as the pipeline does."""
    size = torch.tensor([[height, width]], device=device, dtype=dtype)
    return size, torch.tensor([[height / width]], device=device, dtype=dtype)


@lru_cache
def with_adapters(model: type) -> type:
    """Return a model's class with diffusers' adapter methods, under its own name."""
    from diffusers.loaders import PeftAdapterMixin

    if issubclass(model, PeftAdapterMixin):
        return model
    return type(model.__name__, (model, PeftAdapterMixin), {"__module__": model.__module__})
