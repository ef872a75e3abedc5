"""What an image processor does to pixels, on tensors and with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn.functional import pad

from diffalign.media import resize
from diffalign.media.resampling import Filter

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


@dataclass(frozen=True)
class ClipPreprocessing:
    """What a CLIP image processor does to 8-bit pixels, on tensors and with gradients.

    Attributes:
        resize_to: the shortest edge, (height, width), or None for no resize.
        crop: (height, width) of the centre crop, or None.
        filter: name for `media.resize`.
        mean, std: of each colour channel.
        round_crop: the crop's offset is rounded half to even, as by torchvision, and not down, as by transformers.
        letterbox: `resize_to` is the longest edge, and black bars make the image square.
        rounding: pixels are 8-bit before, between and after the passes of the resize, as in Pillow; else it is linear.
    """

    resize_to: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    filter: Filter
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    round_crop: bool = False
    letterbox: bool = False
    rounding: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Reads the dictionary of a `preprocessor_config.json`.

        What it leaves out is as in `CLIPImageProcessor`, but that SigLIP's processors never crop.
        """
        crops = not config.get("image_processor_type", "").startswith("Siglip")
        resample = config.get("resample", 3)
        if resample not in _FILTERS:
            raise ValueError(f"resample = {resample!r} of the image processor is not one of {_FILTERS}.")
        if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError("the image processor does not rescale by 1/255: its pixels are not those of a CLIP model.")
        normalised = config.get("do_normalize", True)
        preprocessing = cls(
            resize_to=_size(config.get("size", 224)) if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", 224)) if config.get("do_center_crop", crops) else None,
            filter=_FILTERS[resample],
            mean=tuple(config.get("image_mean", OPENAI_MEAN)) if normalised else (0.0,) * 3,
            std=tuple(config.get("image_std", OPENAI_STD)) if normalised else (1.0,) * 3,
        )
        edge, crop = preprocessing.resize_to, preprocessing.crop
        if edge is not None and crop is not None and max(crop) > (edge if isinstance(edge, int) else min(edge)):
            raise ValueError(f"the image processor crops {crop} out of images resized to {edge}: it would have to pad.")
        return preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised (B, 3, h, w)."""
        images = images.float()
        if self.resize_to is not None:
            images = resize(images, self._target(*images.shape[-2:]), self.filter, rounding=self.rounding)
        if self.letterbox:
            images = _square(images)
        if self.crop is not None:
            height, width = self.crop
            spare = (images.shape[-2] - height, images.shape[-1] - width)
            top, left = (round(each / 2) if self.round_crop else each // 2 for each in spare)
            images = images[..., top : top + height, left : left + width]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize_to, int):
            return self.resize_to
        if self.letterbox:
            scale = self.resize_to / max(height, width)
            return round(height * scale), round(width * scale)
        short, long = min(height, width), max(height, width)
        other = int(self.resize_to * long / short)  # truncated, as transformers does
        return (self.resize_to, other) if height <= width else (other, self.resize_to)


def _square(images: Tensor) -> Tensor:
    """Black bars on both sides; the odd row or column lies after the image."""
    height, width = images.shape[-2:]
    tall, wide = max(height, width) - height, max(height, width) - width
    return pad(images, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _size(size: int | dict[str, int]) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if set(size) == {"height", "width"}:
        return _pair(size)
    raise ValueError(f"size = {size} of the image processor is not a shortest edge or a height and a width.")
