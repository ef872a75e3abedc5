"""Images and videos in and out: one pixel contract, bounded files, and a resize that agrees with Pillow."""

from diffalign.media.files import ImageError, MediaError, VideoError
from diffalign.media.pixels import (
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
from diffalign.media.video import Video, open_video, save_video, uniform_indices

__all__ = [
    "ImageError",
    "MediaError",
    "Video",
    "VideoError",
    "from_pil",
    "from_uint8",
    "grid",
    "open_image",
    "open_video",
    "quantise",
    "resize",
    "save_png",
    "save_video",
    "straight_through_clamp",
    "to_pil",
    "to_uint8",
    "uniform_indices",
]
