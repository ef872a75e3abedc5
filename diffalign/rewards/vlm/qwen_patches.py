"""What the image processor of the Qwen-VL family does to 8-bit pixels, on tensors and with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diffalign.media import resize
from diffalign.rewards.preprocessing import ClipPreprocessing

_MAX_ASPECT = 200

Folded = tuple[Tensor, tuple[int, int, int]]
"""Patches (N, 3 x frames x patch x patch) of one figure, and how many (times, rows, columns) of them."""


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
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Reads the dictionary of a `preprocessor_config.json`; what it leaves out is as in `Qwen2VLImageProcessor`.

        ValueError where it does not resize, rescale and normalise.
        """
        config = {key: value for key, value in config.items() if value is not None}
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise ValueError(f"{step} is off in the image processor: these are not the pixels of a Qwen-VL model.")
        size = config.get("size", {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
        colours = ClipPreprocessing.from_config(config | {"do_resize": False, "do_center_crop": False})
        return cls(
            patch=config.get("patch_size", 14),
            frames=config.get("temporal_patch_size", 2),
            merge=config.get("merge_size", 2),
            min_pixels=config["min_pixels"] if "min_pixels" in config else size["shortest_edge"],
            max_pixels=config["max_pixels"] if "max_pixels" in config else size["longest_edge"],
            filter=colours.filter,
            mean=colours.mean,
            std=colours.std,
        )

    def __call__(self, image: Tensor) -> Folded:
        """An image (3, H, W) in [0, 1] to its patches."""
        image = resize(image, self.size(*image.shape[-2:]), self.filter)
        return self.fold(image.expand(self.frames, -1, -1, -1))

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

    def fold(self, frames: Tensor) -> Folded:
        """Frames of a video, or of an image that is repeated, to their patches; nothing is resized.

        Args:
            frames: (F, 3, H, W) in [0, 1]; F is a multiple of ``frames``, H and W are multiples of patch x merge.

        Returns:
            The patches, those that become one token side by side, and (times, rows, columns) of them.
        """
        grid = len(frames) // self.frames, frames.shape[2] // self.patch, frames.shape[3] // self.patch
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        blocks = ((frames - mean) / std).unflatten(3, (-1, self.merge, self.patch))
        blocks = blocks.unflatten(2, (-1, self.merge, self.patch)).unflatten(0, (-1, self.frames))
        # time, frame, colour, row, in row, y, column, in column, x
        blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return blocks.reshape(math.prod(grid), -1), grid
