"""Resizing that is bit-equal to Pillow's and has gradients.

Rewards were trained on images that Pillow resized. Pillow filters along the width, rounds and clips the result to
8 bits, then filters along the height and rounds again. A tensor resize that leaves the roundings out differs by up to
16 levels at edges, where the overshoot of the bicubic and Lanczos filters survives the first pass. Here the same two
passes are done in the same fixed-point arithmetic, and the gradient goes straight through roundings and clips, so it
is exactly the transpose of the linear filter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.media.pixels import straight_through

Filter = Literal["bilinear", "bicubic", "lanczos"]

_FRACTION_BITS = 22  # of Pillow's 8-bit filter weights


def resize(images: Tensor, size: tuple[int, int], filter: Filter = "bicubic", *, rounding: bool = True) -> Tensor:
    """Images (..., H, W) in [0, 1] resized to ``size`` = (height, width), as Pillow resizes their 8-bit pixels.

    The filters widen with the reduction (what other libraries call antialiasing); Pillow has no other mode. The width
    is always filtered first, as Pillow did while today's rewards were trained; since 2026 it starts with the height
    where that shrinks much more than the width, which changes the intermediate rounding.

    Args:
        images: floating tensor (..., H, W). float16 and bfloat16 are filtered in float32 and come back as float32.
        size: (height, width) in pixels.
        filter: "bilinear" (triangle), "bicubic" (Keys, a = -0.5) or "lanczos" (three lobes).
        rounding: clip and round to 8 bits before, between and after the passes. Without it the map is linear, and may
            leave [0, 1].

    Returns:
        Tensor (..., height, width). The gradient is the same with and without ``rounding``. A NaN spoils its channel of
        its image, and no other.
    """
    if not images.is_floating_point():
        raise TypeError(f"resize takes floating images in [0, 1], not {images.dtype}: use media.from_uint8 first.")
    if min(size) < 1:
        raise ValueError(f"size is {tuple(size)}: height and width must be at least one pixel.")
    result = images if images.dtype == torch.float64 else images.float()
    if rounding:
        result = straight_through(result * 255, (result.detach() * 255).clamp(0, 255).round())
    with torch.autocast(images.device.type, enabled=False):
        for dim, length in ((-1, size[1]), (-2, size[0])):
            if result.shape[dim] == length:
                continue  # Pillow skips a pass that would change nothing
            weights = _weights(result.shape[dim], length, filter)
            result = _RoundedPass.apply(result, weights, dim) if rounding else _matmul(result, weights, dim)
    return result / 255 if rounding else result


class _RoundedPass(torch.autograd.Function):
    """One pass over levels 0 to 255 in Pillow's integer arithmetic, with the gradient of the pass without rounding."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, weights: Tensor, dim: int) -> Tensor:
        ctx.weights, ctx.dim = weights, dim
        scaled = weights * 2**_FRACTION_BITS
        fixed = (scaled + 0.5 * scaled.sign()).trunc()
        # float64 holds the sums, integers below 2**31, exactly. Apple's GPUs lack it: there a level may be off by one.
        exact = levels.float() if levels.device.type == "mps" else levels.double()
        total = _matmul(exact, fixed, dim)
        return total.add_(2 ** (_FRACTION_BITS - 1)).div_(2**_FRACTION_BITS).floor_().clamp_(0, 255).to(levels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _matmul(gradient, ctx.weights.T, ctx.dim), None, None


def _matmul(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    weights = weights.to(device=x.device, dtype=x.dtype)
    return x @ weights.T if dim == -1 else weights @ x


@lru_cache(maxsize=64)
def _weights(length: int, new_length: int, filter: str) -> Tensor:
    """Normalised filter weights (new_length, length), float64, sampled at the pixel centres inside the support."""
    if filter not in _FILTERS:
        raise ValueError(f"filter is {filter!r}: use one of {', '.join(sorted(_FILTERS))}.")
    kernel, radius = _FILTERS[filter]
    scale = length / new_length
    stretch = max(scale, 1.0)
    centres = (torch.arange(new_length, dtype=torch.float64) + 0.5) * scale
    # Pillow truncates the window to whole pixels: [int(c - s + 0.5), int(c + s + 0.5))
    first = (centres - radius * stretch + 0.5).clamp(min=0).floor()
    last = (centres + radius * stretch + 0.5).floor().clamp(max=length)
    pixels = torch.arange(length, dtype=torch.float64)
    weights = kernel((pixels[None, :] + 0.5 - centres[:, None]) / stretch)
    weights = weights * ((pixels >= first[:, None]) & (pixels < last[:, None]))
    return weights / weights.sum(dim=1, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _keys_cubic(x: Tensor) -> Tensor:
    """Keys (1981), "Cubic convolution interpolation for digital image processing", with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))


_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_keys_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
