"""The first blocks of a policy's own denoiser as a reader of noisy latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from diffalign.laws import Level
from diffalign.policies import Condition, Policy
from diffalign.policies.flux import image_ids

GUIDANCE_TOLD = 1.0
"""What a denoiser that embeds the guidance scale is told: one number, whatever the sampler's scale."""


class Trunk(ABC):
    """Noisy latents to tokens, by the denoiser's first `blocks` blocks with its adapter off.

    The weights are those of the policy, frozen and not copied; gradients go to the latents.

    Attributes:
        policy: whose denoiser it is.
        blocks: how many of its blocks.

    Raises:
        ValueError: the denoiser has not this many blocks.
    """

    denoiser_class: ClassVar[str]
    """Name of the diffusers class."""

    blocks_of: ClassVar[str] = "transformer_blocks"
    """The attribute of the denoiser that holds its blocks."""

    def __init__(self, policy: Policy, blocks: int) -> None:
        there = len(getattr(policy.denoiser, self.blocks_of))
        if not 1 <= blocks <= there:
            raise ValueError(f"blocks = {blocks} of a {self.denoiser_class} that has {there}: use 1 to {there}")
        self.policy = policy
        self.blocks = blocks

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """(D, E): numbers of a token, and of the embedding of the time."""

    @abstractmethod
    def read(self, denoiser: Any, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and embedding (B, E) of latents (B, C, h, w) in the denoiser's type."""

    def __call__(self, x: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor]:
        """Read latents, each at its own level.

        Args:
            x: (B, C, h, w) noisy latents, the policy's states.
            level: (B,) where each row stands.
            condition: (B, ...) encoded prompts.

        Returns:
            Tokens of the image (B, N, D), and (B, E) the denoiser's embedding of the time and, where it has one, of the
            pooled prompt; both in fp32, or in float64 for a float64 denoiser.
        """
        policy = self.policy
        told = policy.embed_guidance(condition, GUIDANCE_TOLD)
        with nullcontext() if policy.adapter_name is None else policy.reference():
            tokens, time = self.read(policy.denoiser, x.to(policy.dtype), level.timestep.float(), told)
        return tokens.to(policy.state_dtype), time.to(policy.state_dtype)

    def _tensor(self, condition: Condition, name: str) -> Tensor:
        return condition.tensors[name].to(self.policy.dtype)


class SD3Trunk(Trunk):
    """The first joint blocks of Stable Diffusion 3."""

    denoiser_class = "SD3Transformer2DModel"

    @property
    def widths(self) -> tuple[int, int]:
        """The transformer's width, twice."""
        return self.policy.denoiser.inner_dim, self.policy.denoiser.inner_dim

    def read(self, denoiser: Any, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The image's tokens after the last block; those of the prompt are left."""
        tokens = denoiser.pos_embed(x)
        time = denoiser.time_text_embed(timestep, self._tensor(condition, "pooled_prompt_embeds"))
        words = denoiser.context_embedder(self._tensor(condition, "prompt_embeds"))
        for block in denoiser.transformer_blocks[: self.blocks]:
            words, tokens = block(hidden_states=tokens, encoder_hidden_states=words, temb=time)
        return tokens, time


class FluxTrunk(Trunk):
    """The first double blocks of FLUX.1."""

    denoiser_class = "FluxTransformer2DModel"

    @property
    def widths(self) -> tuple[int, int]:
        """The transformer's width, twice."""
        return self.policy.denoiser.inner_dim, self.policy.denoiser.inner_dim

    def read(self, denoiser: Any, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The image's tokens after the last block; those of the prompt are left."""
        guidance = condition.tensors.get("guidance")
        scale = () if guidance is None else (guidance.to(x.dtype) * 1000,)
        pooled = self._tensor(condition, "pooled_prompt_embeds")
        time = denoiser.time_text_embed(timestep.to(x.dtype), *scale, pooled)
        tokens = denoiser.x_embedder(pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        words = denoiser.context_embedder(self._tensor(condition, "prompt_embeds"))
        places = image_ids(x.shape[-2] // 2, x.shape[-1] // 2, x.device)
        rotary = denoiser.pos_embed(torch.cat([places.new_zeros(words.shape[1], 3), places]))
        for block in denoiser.transformer_blocks[: self.blocks]:
            words, tokens = block(hidden_states=tokens, encoder_hidden_states=words, temb=time, image_rotary_emb=rotary)
        return tokens, time


class UNetTrunk(Trunk):
    """The first down blocks of Stable Diffusion 1.x, 2.x and XL."""

    denoiser_class = "UNet2DConditionModel"
    blocks_of = "down_blocks"

    @property
    def widths(self) -> tuple[int, int]:
        """Channels after the last block, and of the embedded time."""
        unet = self.policy.denoiser
        return unet.config.block_out_channels[self.blocks - 1], unet.time_embedding.linear_2.out_features

    def read(self, denoiser: Any, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The places of the feature map after the last block."""
        words, added = self._tensor(condition, "prompt_embeds"), self.policy.added(x, condition)  # type: ignore[attr-defined]
        guidance = condition.tensors.get("timestep_cond")
        time = denoiser.time_embedding(
            denoiser.get_time_embed(sample=x, timestep=timestep), None if guidance is None else guidance.to(x.dtype)
        )
        more = denoiser.get_aug_embed(emb=time, encoder_hidden_states=words, added_cond_kwargs=added)
        time = time if more is None else time + more
        features = denoiser.conv_in(x)
        for block in denoiser.down_blocks[: self.blocks]:
            crossed = {"encoder_hidden_states": words} if getattr(block, "has_cross_attention", False) else {}
            features, _ = block(hidden_states=features, temb=time, **crossed)
        return features.flatten(2).transpose(1, 2), time


TRUNKS: tuple[type[Trunk], ...] = (SD3Trunk, FluxTrunk, UNetTrunk)


def trunk_of(policy: Policy, blocks: int) -> Trunk:
    """The trunk for a policy's denoiser.

    Raises:
        ValueError: no trunk is known for its class, or it has not this many blocks.
    """
    names = [c.__name__ for c in type(policy.denoiser).__mro__]
    for kind in TRUNKS:
        if kind.denoiser_class in names:
            return kind(policy, blocks)
    known = ", ".join(kind.denoiser_class for kind in TRUNKS)
    raise ValueError(f"a noise-aware reward does not read a {names[0]}: use a pipeline with one of {known}")
