"""CLIP score and PickScore over any `DualEncoder`, batched and differentiable.

CLIP score: Hessel et al. (2021), arXiv:2104.08718, here the plain cosine, without the factor 2.5, the clip at zero
and the prefix "A photo depicts". PickScore: Kirstain et al. (2023), arXiv:2305.01569.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.encoders import DualEncoder, load_encoder


class EncoderReward(Reward):
    """A reward on the features of one encoder, which others may share.

    Args:
        path: a folder or hub id, or an encoder.
        name: default: the last part of the path.
        **how: as for `load_encoder`.
    """

    differentiable = True

    def __init__(self, path: str | Path | DualEncoder, *, name: str | None = None, **how: Any) -> None:
        self.encoder = path if isinstance(path, DualEncoder) else load_encoder(path, **how)
        self.name = name or Path(self.encoder.label).name

    def to(self, device: torch.device | str) -> Self:
        """Moves the encoder, for all rewards on it."""
        self.encoder.to(device)
        return self


class CLIPReward(EncoderReward):
    """Cosine of the image's and the prompt's embeddings, in [-1, 1]; 0.15 to 0.35 for OpenAI's models.

    Its arguments are those of `EncoderReward`.
    """

    def __init__(self, path: str | Path | DualEncoder, *, name: str | None = None, **how: Any) -> None:
        super().__init__(path, name=name, **how)
        self.token_limit = self.encoder.token_limit

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Cosines (B,)."""
        return self.encoder.cosine(images, prompts)


class PickScoreReward(CLIPReward):
    """exp(logit_scale) x cosine of a CLIP tuned on preferences, the published form; 16 to 26 for PickScore v1.

    The softmax of the scores of several images of one prompt is the probability that each is preferred.
    """

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scaled cosines (B,)."""
        return self.encoder.logit_scale * self.encoder.cosine(images, prompts)
