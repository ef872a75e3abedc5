"""One score of a network that rates a video in several ways at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from diffalign.rewards.base import Reward


class AspectScorer(Protocol):
    """Scores (B, aspects) of videos (B, F, 3, H, W); what it gave is kept for one batch, see `shared_features`."""

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], /) -> Tensor:
        """Scores for the prompts."""
        ...


class VideoAspect(Reward):
    """A column of what the scorer gives.

    Args:
        scorer: shared by the aspects, as are its weights.
        column: which score.
        name: of the aspect.
        needs: see `Reward`.
    """

    media = "video"
    differentiable = True

    def __init__(self, scorer: AspectScorer, column: int, name: str, needs: tuple[str, ...]) -> None:
        self.scorer, self.column, self.name, self.needs = scorer, column, name, needs

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights, which the aspects share."""
        self.scorer.to(device)
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,) float32 of videos (B, F, 3, H, W)."""
        return self.scorer(images, prompts, metadata)[:, self.column]
