"""Images in and out: one pixel contract, bounded files, and a resize that agrees with Pillow."""

from diffalign.media.pixels import (
    ImageError,
    from_pil,
    from_uint8,
    grid,
    open_image,
    quantise,
    save_png,
    straight_through_clamp,
    to_pil,
    to_uint8,
)
from diffalign.media.resampling import resize

__all__ = [
    "ImageError",
    "from_pil",
    "from_uint8",
    "grid",
    "open_image",
    "quantise",
    "resize",
    "save_png",
    "straight_through_clamp",
    "to_pil",
    "to_uint8",
]
