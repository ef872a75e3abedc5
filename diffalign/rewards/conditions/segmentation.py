"""Classes of an image's pixels, by any semantic segmentation network, against the map that it was conditioned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, kl_div

from diffalign.rewards.conditions.base import ConditionReward, picture
from diffalign.rewards.networks import ImageNetwork

IGNORED = 255


class SegmentationConsistency(ConditionReward):
    """-(mean cross-entropy of the classes that were asked for, in nats), at most 0; differentiable.

    The segmentation reward of ControlNet++ (Li et al. 2024, arXiv:2404.07987). ``metadata["segmentation"]`` is the map
    of class numbers, those of the network's ``id2label``, with 255 for pixels that do not count: a tensor of integers
    (H, W) or (1, H, W), or the path of a PNG whose grey levels are the numbers; colours and compression lose them. It
    is resized by nearest neighbour to the grid of the network's output. A map that counts no pixel fails.

    Departures: networks are those of transformers and not mmsegmentation's, and see images as their processor makes
    them; ADE20K's labels, from 0 for the background, are not shifted here.

    Args:
        path: a folder or hub id of an `AutoModelForSemanticSegmentation`.
        name: default: the last part of the path.
        **how: ``processor`` and ``revision``, as for `ImageNetwork`.
    """

    needs = ("segmentation",)
    files = ("segmentation",)

    def __init__(self, path: str | Path, *, name: str | None = None, **how: Any) -> None:
        self.network = ImageNetwork("AutoModelForSemanticSegmentation", path, **how)
        self.name = name or self.network.label

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w)."""
        return self.network(images).logits

    def target(self, condition: Any, prediction: Tensor) -> Tensor:
        """Class numbers (h, w). ValueError: the map has colours, or a class that the network does not know."""
        wanted = picture(condition, "segmentation")
        if not isinstance(condition, Tensor):
            if not (wanted == wanted[:1]).all():
                raise ValueError("segmentation is a picture in colours: save the class numbers as grey levels")
            wanted = (wanted[:1] * 255).round().long()
        if len(wanted) != 1 or wanted.is_floating_point():
            raise ValueError(f"segmentation is {tuple(wanted.shape)} {wanted.dtype}: give integers (H, W)")
        wanted, classes = wanted.long(), prediction.shape[1]
        unknown = wanted[(wanted != IGNORED) & ((wanted < 0) | (wanted >= classes))]
        if len(unknown):
            raise ValueError(f"segmentation has class {int(unknown[0])}, and the network knows 0 to {classes - 1}")
        grid = interpolate(wanted[None].double(), prediction.shape[-2:], mode="nearest")[0, 0].long()
        if (grid == IGNORED).all():
            raise ValueError(f"segmentation counts no pixel: it is {IGNORED} everywhere")
        return grid

    def errors(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies (B, h, w)."""
        return cross_entropy(prediction, targets, ignore_index=IGNORED, reduction="none")

    def counted(self, targets: Tensor) -> Tensor:
        """(B, h, w), all but 255."""
        return targets != IGNORED

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """KL(second || first) of the class distributions (B, h, w), in nats."""
        logs = first.log_softmax(dim=1), second.log_softmax(dim=1)
        return torch.sum(kl_div(*logs, reduction="none", log_target=True), dim=1)
