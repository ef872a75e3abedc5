"""The pixel contract: images are float tensors (B, 3, H, W) in [0, 1]; files and Pillow images are 8-bit RGB.

Scores are reported for the 8-bit pixels that a user would save, so ``quantise`` gives exactly what a saved PNG holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffalign.media.files import ImageError, reading, shown

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20  # more than MAX_PIXELS of 8-bit RGB take without any compression


def straight_through_clamp(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """``x.clamp(low, high)`` whose gradient is the identity, so that a pixel outside can still be pulled back.

    Bengio et al. (2013), arXiv:1308.3432. NaN stays NaN.
    """
    return straight_through(x, x.detach().clamp(low, high))


def quantise(images: Tensor) -> Tensor:
    """Float images as they come back from an 8-bit file: clipped to [0, 1] and rounded to multiples of 1/255.

    The gradient is the identity. NaN stays NaN: a broken image must not become a black one that is then scored.
    """
    values = images.detach() if images.dtype == torch.float64 else images.detach().float()
    levels = (values.clamp(0, 1) * 255).round()
    return straight_through(images, (levels / 255).to(images.dtype))


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, exactly, with the gradient of ``x``."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    return value + (x - x.detach())  # the bracket is exactly zero, its gradient one


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to 8 bits: clipped, times 255, rounded half to even as diffusers does. NaN becomes 0."""
    if not images.is_floating_point():
        raise TypeError(f"to_uint8 takes floating images in [0, 1], not {images.dtype}.")
    values = images.detach() if images.dtype == torch.float64 else images.detach().float()
    return (values.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """8-bit images to float32 in [0, 1]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"from_uint8 takes torch.uint8 images, not {images.dtype}.")
    return images.float() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W), floating in [0, 1] or 8-bit, as RGB Pillow images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected (B, 3, H, W).")
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pillow images of one size as float32 (B, 3, H, W) in [0, 1]; other modes are converted to RGB first."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images have sizes {sorted(sizes)}: a batch holds images of one size, and at least one.")
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return from_uint8(torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous())


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PNG, JPEG or WebP file as an upright 8-bit RGB image. Of an animation the first frame; transparency is dropped.

    Only the header is read before the size is checked, so a small file that unpacks to a huge image costs nothing. Of
    colours of 16 bits the upper 8 are kept, as Pillow does; grey of 16 bits is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: another format, a broken file, more than ``max_pixels`` pixels or `MAX_BYTES` bytes, or 16-bit grey.
    """
    path = Path(path)
    with reading(path, ImageError, MAX_BYTES) as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(f"{shown(path)} is not a {', '.join(FORMATS)} image, or its header is broken.") from error
        with image:
            if math.prod(image.size) > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"{shown(path)} has {size} pixels: at most {max_pixels} are opened.")
            if image.mode.startswith(("I", "F")):
                raise ImageError(
                    f"{shown(path)} has more than 8 bits a channel (mode {image.mode}): save it with 8 bits."
                )
            return ImageOps.exif_transpose(image).convert("RGB")


def save_png(image: Tensor | Image.Image, path: str | Path) -> None:
    """One image, (3, H, W) as for `to_pil` or Pillow, written losslessly; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (to_pil(image[None])[0] if isinstance(image, Tensor) else image).save(path, format="PNG")


def grid(images: Tensor | Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Images of one size (as for `to_pil`, or Pillow) on a white sheet, row by row; near square without ``columns``."""
    tiles = to_pil(images) if isinstance(images, Tensor) else list(images)
    if not tiles:
        raise ValueError("grid needs at least one image.")
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
