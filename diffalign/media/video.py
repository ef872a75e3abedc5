"""Videos in and out: 8-bit RGB frames and a frame rate, read in bounded memory through PyAV."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.media.files import VideoError, reading, shown
from diffalign.media.pixels import to_uint8

CONTAINERS = "mov,mp4,matroska,webm,avi,gif"  # FFmpeg's names; a playlist, which may name other files, is none of them
MAX_FRAMES = 1024
MAX_VIDEO_PIXELS = 256 * 2**20  # of all frames together: 768 MiB
MAX_VIDEO_BYTES = 2**30
MAX_BLOCK = 128 * 2**20  # of memory that FFmpeg may take at once: a frame of 44 million pixels


@dataclass(frozen=True)
class Video:
    """What a video file holds.

    Attributes:
        frames: (F, 3, H, W) uint8, RGB, upright. `from_uint8` makes them what rewards take.
        fps: frames a second; of a variable rate the average.
    """

    frames: Tensor
    fps: float


def open_video(path: str | Path, *, max_frames: int = MAX_FRAMES, max_pixels: int = MAX_VIDEO_PIXELS) -> Video:
    """An MP4, QuickTime, Matroska, WebM, AVI or GIF file as upright 8-bit RGB frames.

    What the header says is checked before anything is decoded. A longer or larger video is refused and not cut: its
    score would be another video's. Frames are as stored: neither a sample aspect ratio nor transparency is applied. Of
    a Matroska or WebM file that was cut off, which does not tell, the frames that are there are read.

    Args:
        path: the file.
        max_frames: how many frames it may have.
        max_pixels: how many pixels all its frames may have together; three bytes of memory each.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: another format, a broken or damaged file, or one over a bound.
        ValueError: PyAV is not installed.
    """
    av, path = _av(), Path(path)
    _bound_blocks(av)
    # The decoder is told as well: a stream may be larger than its header says.
    limits = {"format_whitelist": CONTAINERS, "max_pixels": str(max_pixels)}
    with reading(path, VideoError, MAX_VIDEO_BYTES) as file:
        try:
            with av.open(file, options=limits, metadata_errors="replace") as container:
                return _read(container, path, max_frames, max_pixels)
        except av.error.ArgumentError as error:  # all that FFmpeg says of either
            raise VideoError(
                f"{shown(path)} is no video of a kind that is read ({CONTAINERS}), or one of its frames has more than "
                f"{max_pixels} pixels."
            ) from error


def save_video(frames: Tensor, path: str | Path, fps: float) -> None:
    """Frames (F, 3, H, W), floating in [0, 1] or 8-bit, as an H.264 MP4 file; folders are made.

    The file is for eyes: its compression is lossy, and where both sides are even colour has half the resolution.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"the video has shape {tuple(frames.shape)}: expected (F, 3, H, W), and at least one frame.")
    if not fps > 0:
        raise ValueError(f"fps is {fps}: a video has more than none.")
    av, path = _av(), Path(path)
    pixels = frames if frames.dtype == torch.uint8 else to_uint8(frames)
    height, width = pixels.shape[-2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        # Where it looks ahead, x264 is not deterministic on some processors with AVX-512: equal frames, other file.
        how = {"crf": "17", "mbtree": "0", "rc-lookahead": "0"}
        stream = container.add_stream("libx264", rate=rate, options=how)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        # Said in the file, since players guess otherwise, and by the size: 1 is BT.709, and its limited range.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for array in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def uniform_indices(count: int, number: int) -> list[int]:
    """``number`` of ``count`` frames at equal distances, first and last included; all where there are no more."""
    if number >= count:
        return list(range(count))
    return [round(k * (count - 1) / max(number - 1, 1)) for k in range(number)]


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("videos need PyAV: pip install 'diffalign[video]'") from error
    return av


def _bound_blocks(av: Any) -> None:
    """Bounds each allocation of FFmpeg, for the whole process: an MP4 of 2 kB can ask for an index of 4 GiB."""
    try:
        limit = ctypes.CDLL(av._core.__file__).av_max_alloc
    except (AttributeError, OSError):
        return  # on Windows, where a library does not show the symbols of those that it uses, nothing is bounded
    limit.argtypes, limit.restype = [ctypes.c_size_t], None
    limit(MAX_BLOCK)


def _read(container: Any, path: Path, max_frames: int, max_pixels: int) -> Video:
    if not container.streams.video:
        raise VideoError(f"{shown(path)} holds no video.")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{shown(path)} is in a coding that this PyAV cannot read.")
    stream.codec_context.options = {"max_pixels": str(max_pixels)}
    count, width, height = stream.frames, stream.codec_context.width, stream.codec_context.height
    if count > max_frames:
        raise VideoError(f"{shown(path)} has {count} frames: at most {max_frames} are opened.")
    if max(count, 1) * width * height > max_pixels:
        raise VideoError(
            f"{shown(path)} has {max(count, 1)} frames of {width} x {height} pixels: at most {max_pixels} pixels "
            "are opened."
        )
    frames = list(_decoded(container.decode(stream), path, max_frames, max_pixels))
    if not frames:
        raise VideoError(f"{shown(path)} holds no frame.")
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise VideoError(f"{shown(path)} tells no frame rate.")
    return Video(_stacked(frames), float(rate))


def _decoded(frames: Iterator[Any], path: Path, max_frames: int, max_pixels: int) -> Iterator[np.ndarray]:
    """Upright arrays (H, W, 3) uint8 of one size, while the bounds hold."""
    size, total = None, 0
    for index, frame in enumerate(frames):
        total += frame.width * frame.height
        if index == max_frames or total > max_pixels:
            raise VideoError(
                f"{shown(path)} has more than {index} frames of {frame.width} x {frame.height} pixels: at most "
                f"{max_frames} frames and {max_pixels} pixels are opened."
            )
        if frame.is_corrupt:
            raise VideoError(f"{shown(path)} is damaged at frame {index}.")
        if size not in (None, (frame.width, frame.height)):
            raise VideoError(f"{shown(path)} changes its size at frame {index}.")
        size = (frame.width, frame.height)
        yield _upright(frame, path)


def _upright(frame: Any, path: Path) -> np.ndarray:
    """(H, W, 3) as it is to be seen: the display matrix (a b u; c d v; ...) takes (x, y) to (a x + c y, b x + d y)."""
    array = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return array
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if b == c == 0 and a and d:
        right, down = a, d
    elif a == d == 0 and b and c:
        array, right, down = array.swapaxes(0, 1), c, b
    else:
        raise VideoError(
            f"{shown(path)} is to be shown turned by {frame.rotation} degrees: only quarter turns are read."
        )
    return array[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1]


def _stacked(frames: list[np.ndarray]) -> Tensor:
    """(F, 3, H, W) of arrays (H, W, 3). The list is emptied on the way, so that the video is not in memory twice."""
    height, width, _ = frames[0].shape
    video = torch.empty((len(frames), 3, height, width), dtype=torch.uint8)
    for index in reversed(range(len(frames))):
        video[index] = torch.from_numpy(frames.pop().transpose(2, 0, 1).copy())
    return video
