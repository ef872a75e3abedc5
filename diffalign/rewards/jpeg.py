"""JPEG size: the incompressibility of DDPO, Black et al. (2023), arXiv:2305.13301, section 5."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from diffalign.media import to_pil
from diffalign.rewards.base import Reward


class JpegSize(Reward):
    """The size of the image as a JPEG of quality 95, in kB of 1,000 bytes; more is harder to compress.

    As it is, it is DDPO's incompressibility; compressibility is its negative, a weight of -1 (Flow-GRPO's is that over
    500, a weight of -0.002). It grows with the number of pixels, and a few per cent of it are the encoder's: Pillow's,
    with colour at half the resolution. Not differentiable.
    """

    needs = ()

    def __init__(self, name: str = "jpeg-size") -> None:
        self.name = name

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Sizes (B,) in kB."""
        return images.new_tensor([_kilobytes(picture) for picture in to_pil(images)], dtype=torch.float32)


def _kilobytes(picture: Any) -> float:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
