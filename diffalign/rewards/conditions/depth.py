"""Depth of an image, by any depth network of transformers, against the map that it was conditioned on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.media import resize
from diffalign.rewards.conditions.base import ConditionReward, picture
from diffalign.rewards.networks import ImageNetwork


class DepthConsistency(ConditionReward):
    """-(mean squared difference of two depth maps, each divided by its own maximum), in [-1, 0]; differentiable.

    The depth reward of ControlNet++ (Li et al. 2024, arXiv:2404.07987), with the same networks' maps. Where the
    network finds no depth above 0 anywhere, the score fails. ``metadata["depth"]`` is the map: a path, of whose colours
    the mean is taken, or a tensor (H, W) or (C, H, W), in any units, as the network tells depth (MiDaS and DPT: the
    nearer, the larger). Both maps are compared at the image's size; departure: images are resized as the network's
    image processor does, and not by bilinear interpolation to 384 pixels.

    Args:
        path: a folder or hub id of an `AutoModelForDepthEstimation`, such as those of Depth Anything.
        name: default: the last part of the path.
        **how: ``processor`` and ``revision``, as for `ImageNetwork`.
    """

    needs = ("depth",)
    files = ("depth",)

    def __init__(self, path: str | Path, *, name: str | None = None, **how: Any) -> None:
        self.network = ImageNetwork("AutoModelForDepthEstimation", path, **how)
        self.name = name or self.network.label

    def predict(self, images: Tensor) -> Tensor:
        """Depth maps (B, H, W), 1 at their maximum."""
        return _relative(
            resize(self.network(images).predicted_depth, tuple(images.shape[-2:]), "bilinear", rounding=False)
        )

    def target(self, condition: Any, prediction: Tensor) -> Tensor:
        """(H, W), 1 at its maximum. ValueError: it has no depth above 0."""
        wanted = picture(condition, "depth").to(prediction.dtype).mean(dim=0)
        if not wanted.max() > 0:
            raise ValueError(f"depth has the maximum {float(wanted.max()):g}: a map of depth reaches above 0")
        wanted = wanted.to(prediction.device)  # only now: the check of a file's map waits for no device
        return _relative(resize(wanted, tuple(prediction.shape[-2:]), "bilinear", rounding=False)[None])[0]


def _relative(depth: Tensor) -> Tensor:
    """(B, H, W) divided by the maximum of each, NaN where that is not above 0."""
    most = depth.amax(dim=(1, 2), keepdim=True)
    return depth / most.masked_fill(most <= 0, math.nan)
