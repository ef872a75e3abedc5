"""What condition rewards share: a map found in the image, compared with the one that was asked for.

The distances are those of ControlNet++ (Li et al. 2024, arXiv:2404.07987), which Ctrl-U (Zhang et al. 2024,
arXiv:2410.11236) weights by uncertainty; both were read in their authors' code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.media import from_pil, open_image
from diffalign.rewards.base import Metadata, Reward
from diffalign.rewards.networks import ImageNetwork


class ConditionReward(Reward):
    """-(mean over the pixels that count of the error of the image's map). Subclasses write ``predict`` and ``target``.

    The error of a pixel is here the squared difference, and two predictions disagree by the absolute one.
    """

    differentiable = True
    network: ImageNetwork | None = None

    def to(self, device: torch.device | str) -> Self:
        """Moves the network, if there is one."""
        if self.network is not None:
            self.network.to(device)
        return self

    def predict(self, images: Tensor) -> Tensor:
        """The maps (B, ..., h, w) of images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def target(self, condition: Any, prediction: Tensor) -> Tensor:
        """The map (h, w) that one sample was asked for, on the grid of the prediction. ValueError: it is no map."""
        raise NotImplementedError

    def errors(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """(B, h, w), 0 where a pixel does not count."""
        return (prediction - targets) ** 2

    def counted(self, targets: Tensor) -> Tensor:
        """Which pixels of the targets (B, h, w) count."""
        return torch.ones_like(targets, dtype=torch.bool)

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """How uncertain each pixel is (B, h, w), from two predictions."""
        return (first - second).abs()

    def targets(self, prediction: Tensor, metadata: Metadata) -> Tensor:
        """The maps (B, h, w) that the samples were asked for."""
        key = self.needs[0]
        found = [self.target(entry.get(key), prediction) for entry in metadata]
        return torch.stack([each.to(prediction.device) for each in found])

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Minus the mean errors (B,)."""
        prediction = self.predict(images)
        targets = self.targets(prediction, metadata)
        return -_mean(self.errors(prediction, targets), self.counted(targets))


def uncertainty_weighted_loss(
    reward: ConditionReward, images: Tensor, others: Tensor, metadata: Metadata, weight: float
) -> Tensor:
    """mean(exp(-u) L) + weight x mean(u), Ctrl-U's loss of two attempts at the same sample; with gradients.

    L is the error of each pixel of ``images``, and u, the uncertainty of that pixel, is how far the maps of ``images``
    and ``others`` disagree: |p - p'| for edges and depth, KL(p' || p) of the class distributions for segmentation. An
    error that the network would not make again counts less, and the second term keeps u from growing. In the authors'
    code weight is 0.1 for depth and edges, and 1 for segmentation. L is averaged over the pixels that count, u over
    all, and gradients flow through u too, as there.

    What makes two attempts of one is a trainer's part: there both are predictions of x0 in a single step, from two
    noise levels of one training image under one condition, and only where t <= 400 of 1000; the loss is multiplied
    with a factor that rises over 5,000 steps to 0.1 (segmentation) or 1, and added to the denoising loss.

    Args:
        reward: whose map and errors.
        images: (B, 3, H, W) in [0, 1].
        others: (B, 3, H, W), the second attempts.
        metadata: B dicts, with the conditions.
        weight: lambda, at least 0.

    Returns:
        (B,) losses, to be minimised. Nothing is caught: a condition that cannot be read raises.
    """
    if len(images) != len(others) or len(images) != len(metadata):
        raise ValueError(
            f"{len(images)} images, {len(others)} second attempts and {len(metadata)} metadata: the counts must be "
            "equal."
        )
    if not weight >= 0:
        raise ValueError(f"weight is {weight}: below 0 it would reward uncertainty.")
    first, second = reward.predict(images), reward.predict(others)
    targets = reward.targets(first, metadata)
    uncertainty = reward.disagreement(first, second)
    rectified = _mean((-uncertainty).exp() * reward.errors(first, targets), reward.counted(targets))
    return rectified + weight * uncertainty.flatten(1).mean(dim=1)


def picture(value: Any, key: str) -> Tensor:
    """A map from metadata as a tensor (C, H, W): a file has 3 channels, a tensor (H, W) 1. ValueError: neither."""
    if isinstance(value, str | Path):
        return from_pil(open_image(value))[0]
    if isinstance(value, Tensor) and value.ndim in (2, 3) and value.numel():
        return value[None] if value.ndim == 2 else value
    kind = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
    raise ValueError(f"{key} is {kind}, and must be a path or a tensor (H, W) or (C, H, W)")


def _mean(errors: Tensor, counted: Tensor) -> Tensor:
    """(B,) means over the pixels that count; NaN where none does."""
    return (errors * counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1)
