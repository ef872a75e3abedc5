"""Edges without weights: those of Canny (1986) before the thresholds, as strengths that have gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffalign.media import resize
from diffalign.rewards.conditions.base import ConditionReward, picture

_EPSILON = 1e-6
_LUMA = (0.299, 0.587, 0.114)
# Where the neighbours along the gradient are, by its angle in eighths of a turn, modulo half a turn: (down, right).
_NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1))


class EdgeConsistency(ConditionReward):
    """-(mean squared difference of the edge strengths of the image and of the picture that it is to follow).

    The Canny reward of ControlNet++ (Li et al. 2024, arXiv:2404.07987), without weights: `edge_strength` of both
    pictures. ``metadata["edges"]`` is the picture whose edges are wanted, a path or a tensor (3, H, W) in [0, 1], which
    is resized to the image's size; or a tensor (H, W) or (1, H, W) of strengths, of the image's size. A black-and-white
    Canny map has lost the strengths: give the picture that it was made from.
    """

    needs = ("edges",)
    files = ("edges",)

    def __init__(self, name: str = "edge-consistency") -> None:
        self.name = name

    def predict(self, images: Tensor) -> Tensor:
        """Edge strengths (B, H, W)."""
        return edge_strength(images)

    def target(self, condition: Any, prediction: Tensor) -> Tensor:
        """Edge strengths (H, W) of the picture. ValueError: strengths of another size."""
        wanted, size = picture(condition, "edges").to(prediction), tuple(prediction.shape[-2:])
        if len(wanted) == 3:
            return edge_strength(resize(wanted[None], size))[0]
        if tuple(wanted.shape) != (1, *size):
            raise ValueError(
                f"edges are strengths of shape {tuple(wanted.shape)} for an image of {size}: give the picture that "
                "they were found in, which can be resized"
            )
        return wanted[0]


def edge_strength(images: Tensor) -> Tensor:
    """sqrt(gx^2 + gy^2 + 1e-6) where it is a maximum along the gradient, 0 elsewhere; (B, H, W).

    A straight edge from black to white has 2.6. The gradient is Sobel's, without a factor, of the grey image blurred by
    a Gaussian of 5 x 5 pixels and sigma 1. Which pixels are maxima has no gradient; their strength has.

    A departure from ControlNet++'s code, which is kornia's: there a maximum exceeds both neighbours, and of two that
    are equal, as on both sides of a sharp edge, none stays unless rounding tells them apart; here one stays.

    Args:
        images: (B, 3, H, W) in [0, 1], at least 3 x 3 pixels.
    """
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"images are {tuple(images.shape[-2:])}: edges need at least 3 x 3 pixels")
    grey = (images * images.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    bell = torch.exp(-torch.arange(-2, 3, dtype=torch.float64).square() / 2)
    bell = (bell / bell.sum()).tolist()
    blurred = _filtered(_filtered(pad(grey, (2, 2, 2, 2), mode="reflect"), bell, -1), bell, -2)
    padded = pad(blurred, (1, 1, 1, 1), mode="replicate")[:, 0]
    across, down = (_filtered(_filtered(padded, [-1, 0, 1], a), [1, 2, 1], b) for a, b in ((-1, -2), (-2, -1)))
    strength = (across**2 + down**2 + _EPSILON).sqrt()
    return strength * _is_maximum(strength.detach(), across.detach(), down.detach())


def _filtered(images: Tensor, weights: list[float], dim: int) -> Tensor:
    """Correlate with a filter along one dimension, without padding.

    A convolution rounds otherwise in another batch, and rounding decides which of two equal neighbours is a maximum.
    """
    count = images.shape[dim] - len(weights) + 1
    return sum(weight * images.narrow(dim, k, count) for k, weight in enumerate(weights))  # type: ignore[return-value]


def _is_maximum(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Where the strength (B, H, W) exceeds one neighbour along the gradient and is no less than the other."""
    eighth = (torch.atan2(down, across) / (torch.pi / 4)).round().long() % 4
    height, width = strength.shape[-2:]
    around = pad(strength, (1, 1, 1, 1))  # outside of the image nothing is stronger
    found = torch.zeros_like(strength, dtype=torch.bool)
    for axis, (y, x) in enumerate(_NEIGHBOURS):
        ahead = around[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = around[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width]
        found |= (eighth == axis) & (strength > ahead) & (strength >= behind)
    return found
