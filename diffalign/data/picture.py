"""An image that is trained on: a file, or the encoded bytes of one."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from diffalign import media


def open_fitted(source: Path | bytes, size: tuple[int, int]) -> Tensor:
    """The image, (3, H, W) in [0, 1] with `size` = (H, W).

    An image of another size is resized by Pillow's bicubic filter so that it covers the asked one, and cropped in the
    middle.

    Raises:
        ValueError: it cannot be opened; the message begins with the file, or for bytes with the reason.
    """
    height, width = size
    image = _opened(source)
    fitting = image.size == (width, height)
    fitted = image if fitting else ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return media.from_pil([fitted])[0]


def content_digest(source: Path | bytes) -> str:
    """sha256 of the file of an image."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(source: Path | bytes) -> Image.Image:
    if isinstance(source, Path):
        return media.open_image(source)
    # The bounded reader opens files: this one is gone again when its pixels are there.
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        file = Path(folder) / "image"
        file.write_bytes(source)
        try:
            return media.open_image(file)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{file} ")) from None
