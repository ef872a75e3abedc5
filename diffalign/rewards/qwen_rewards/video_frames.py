"""Which frames of a video VideoReward sees: the rule of qwen-vl-utils, as its authors have it."""

from __future__ import annotations

import math

import torch

_FACTOR = 2  # frames of a patch
_LEAST, _MOST = 4, 768


def frame_indices(count: int, fps: float, wanted: float = 2.0) -> list[int]:
    """Indices of the frames, first and last included, at equal distances up to rounding.

    Their number is the even number nearest to count / fps x wanted, but at least 4 and at most 768, and no more than
    there are.

    Args:
        count: frames of the video.
        fps: frames a second of the video.
        wanted: frames a second to see.

    Raises:
        ValueError: fps is not above 0, or the video has fewer than 2 frames.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}: a video has more than none.")
    if count < _FACTOR:
        raise ValueError(f"the video has {count} frame, and a moving one has at least {_FACTOR}.")
    most = min(_MOST, count) // _FACTOR * _FACTOR
    number = round(min(max(count / fps * wanted, _LEAST), most) / _FACTOR) * _FACTOR  # half to even, as theirs
    return torch.linspace(0, count - 1, number).round().long().tolist()
