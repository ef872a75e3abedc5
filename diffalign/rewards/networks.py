"""Networks of transformers that read images, preprocessed as their checkpoints say, with gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.preprocessing import ClipPreprocessing
from diffalign.rewards.weights import pretrained


@dataclass(frozen=True)
class NetworkPreprocessing(ClipPreprocessing):
    """What an image processor of transformers does to 8-bit pixels: resize, centre crop, normalise.

    Attributes:
        multiple: both sides become multiples of it, as for networks of the DPT family.
        keep_ratio: of height and width; the side that changes less is resized to its size, the other follows.
    """

    multiple: int = 1
    keep_ratio: bool = False

    @classmethod
    def from_processor(cls, processor: Any, place: str) -> Self:
        """Reads a processor with its class's defaults in it. ValueError: it does what is not done here, such as pad."""
        # What a processor does not tell it does not do; `from_config` would take it for CLIP's.
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        told = dict.fromkeys((*steps, "size", "resample")) | processor.to_dict()
        if told.get("do_pad"):
            raise ValueError(f"the image processor of {place} pads: use a network whose processor only resizes.")
        multiple, keep_ratio = told.get("ensure_multiple_of") or 1, bool(told.get("keep_aspect_ratio"))
        return replace(cls.from_config(told), multiple=multiple, keep_ratio=keep_ratio)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        size = super()._target(height, width)
        if self.multiple == 1 and not self.keep_ratio:
            return size
        scales = size[0] / height, size[1] / width
        if self.keep_ratio:
            scales = (scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0],) * 2
        down, across = (round(s * side / self.multiple) for s, side in zip(scales, (height, width), strict=True))
        return max(down, 1) * self.multiple, max(across, 1) * self.multiple


class ImageNetwork:
    """A frozen network on images (B, 3, H, W) in [0, 1].

    Args:
        kind: the class of transformers that builds it, such as "AutoModelForDepthEstimation".
        path: a folder or hub id with safetensors.
        processor: folder or id of the image processor, where it is not beside the weights.
        revision: of the hub repository.
        **parts: arguments of the network's class, such as which parts it is to be built without.

    Raises:
        ValueError: the checkpoint is of another kind or lacks weights, or its preprocessing is not known here.
    """

    def __init__(
        self,
        kind: str,
        path: str | Path,
        *,
        processor: str | Path | None = None,
        revision: str | None = None,
        **parts: Any,
    ) -> None:
        self.label = Path(path).name
        self.model = load_network(kind, str(path), revision, **parts)
        source, of = (str(path), revision) if processor is None else (str(processor), None)
        self.preprocessing = NetworkPreprocessing.from_processor(load_processor(source, of), source)

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""
        self.model.to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def __call__(self, images: Tensor) -> Any:
        """The network's output in float32; images are rounded to 8 bits before, and gradients go straight through."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model(pixel_values=self.preprocessing(images.to(self.device)))


def load_network(kind: str, path: str, revision: str | None = None, **parts: Any) -> Any:
    """The frozen network of a folder or hub id, float32, in evaluation; safetensors only. ValueError as above."""
    ensure_torchvision()
    import transformers

    try:
        return pretrained(getattr(transformers, kind), path, revision, torch.float32, **parts)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{path} is no model that transformers' {kind} builds: name one of that kind.") from error


def load_processor(path: str, revision: str | None = None) -> Any:
    """The image processor of a folder or hub id, the one that works as Pillow does."""
    ensure_torchvision()
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
