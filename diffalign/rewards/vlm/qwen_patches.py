"""What the image processor of the Qwen-VL family does to 8-bit pixels, on tensors and with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.media import resize

_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_MAX_ASPECT = 200


@dataclass(frozen=True)
class QwenPatches:
    """Images to the patches of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    Wang et al. (2024), arXiv:2409.12191, section 2.1: each image keeps about its own size, height and width become
    multiples of patch x merge pixels, and an image is a video of two equal frames. Agrees with transformers' processor
    to float rounding where Pillow filters the width first, see `media.resize`.

    Attributes:
        patch: edge of a patch in pixels (14; 16 for Qwen3-VL).
        frames: frames of a patch (2).
        merge: patches along each edge that become one token (2).
        min_pixels, max_pixels: bounds of height x width after the resize.
        filter: name for `media.resize`.
        mean, std: of each colour channel.
    """

    patch: int
    frames: int
    merge: int
    min_pixels: int
    max_pixels: int
    filter: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: Any) -> Self:
        """Reads a transformers `Qwen2VLImageProcessor`. ValueError where it does not resize, rescale and normalise."""
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(processor, step):
                raise ValueError(f"{step} is off in the image processor: these are not the pixels of a Qwen-VL model.")
        if abs(processor.rescale_factor * 255 - 1) > 1e-6:
            raise ValueError(f"the image processor rescales by {processor.rescale_factor}, and not by 1/255.")
        if processor.resample not in _FILTERS:
            raise ValueError(f"resample = {processor.resample!r} of the image processor is not one of {_FILTERS}.")
        size = processor.size
        return cls(
            patch=processor.patch_size,
            frames=processor.temporal_patch_size,
            merge=processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            filter=_FILTERS[processor.resample],
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images, each (3, H, W) in [0, 1], to their patches.

        Returns:
            (N, 3 x frames x patch x patch) patches of all images, one image after the other, those that become one
            token side by side; and (len(images), 3) integers, each image's (1, rows, columns) of patches.
        """
        patches, grids = zip(*(self._patches(image) for image in images), strict=True)
        return torch.cat(patches), torch.tensor(grids, device=images[0].device)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize.

        Multiples of patch x merge nearest to the image's own; where their product leaves its bounds, the multiples
        below (above) an image scaled down (up) to the bound. ValueError beyond an aspect of 200, as transformers.
        """
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise ValueError(f"an image of {height} x {width} pixels is more than {_MAX_ASPECT} times as long as wide.")
        unit = self.patch * self.merge
        # Python's round, half to even, is transformers' too.
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(edge / shrink / unit)) for edge in (height, width))
        elif rows * columns * unit**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(edge * grow / unit) for edge in (height, width))
        return rows * unit, columns * unit

    def fold(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Frames of a video, or of an image that is repeated, to their patches; nothing is resized.

        Args:
            frames: (F, 3, H, W) in [0, 1]; F is a multiple of ``frames``, H and W are multiples of patch x merge.

        Returns:
            (N, 3 x frames x patch x patch) patches in the order of `__call__`, and (times, rows, columns) of them.
        """
        grid = len(frames) // self.frames, frames.shape[2] // self.patch, frames.shape[3] // self.patch
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        blocks = ((frames - mean) / std).unflatten(3, (-1, self.merge, self.patch))
        blocks = blocks.unflatten(2, (-1, self.merge, self.patch)).unflatten(0, (-1, self.frames))
        # time, frame, colour, row, in row, y, column, in column, x
        blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return blocks.reshape(math.prod(grid), -1), grid

    def _patches(self, image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        image = resize(image, self.size(*image.shape[-2:]), self.filter)
        return self.fold(image.expand(self.frames, -1, -1, -1))
