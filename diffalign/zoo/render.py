"""Draw scenes: vectorised signed distances, supersampled, on a light background."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffalign.zoo.world import COLORS, SHAPES, Scene

RESOLUTION = 64
BACKGROUND = torch.tensor([246.0, 244.0, 239.0]) / 255
PALETTE = (
    torch.tensor(
        [[208, 46, 50], [240, 128, 34], [250, 212, 60], [52, 158, 84], [42, 102, 200], [146, 72, 178]],
        dtype=torch.float32,
    )
    / 255
)  # in the order of COLORS
RADIUS = {"small": 6.5, "medium": 10.0, "large": 14.0}
"""Half of a shape's largest extent in pixels; drawn with a jitter of 6 %."""

# Each shape is n-fold symmetric and bounded, inside one folded half-sector, by a single line through
# (outer radius, angle 0) and (inner radius, angle pi / n); a circle has no line. `turn` puts a corner on top.
_FOLDS = torch.tensor([1.0, 4.0, 3.0, 5.0])
_OUTER = torch.tensor([1.0, 0.9 * math.sqrt(2), 1.15, 1.1])
_INNER = torch.tensor([1.0, 0.9, 0.575, 0.5])
_TURN = torch.tensor([0.0, math.pi / 4, -math.pi / 2, -math.pi / 2])
_SHIFT = torch.tensor([0.0, 0.0, 0.29, 0.1])  # centroid below the middle of the extent, in radii
AREA = torch.tensor([math.pi, 3.24, 0.75 * math.sqrt(3) * 1.15**2, 5 * 1.1 * 0.5 * math.sin(math.pi / 5)])
"""Area of each shape of radius 1, in the order of SHAPES."""


def coverage(shape: torch.Tensor, center: torch.Tensor, radius: torch.Tensor, supersample: int = 2) -> torch.Tensor:
    """How much of each pixel a shape covers: (N, 64, 64) in [0, 1].

    `shape` (N,) indexes SHAPES; `center` (N, 2) is the centroid (x, y) and `radius` (N,) half the extent, in pixels.
    """
    size = RESOLUTION * supersample
    axis = (torch.arange(size) + 0.5) / supersample
    dx = axis[None, None, :] - center[:, 0, None, None]
    dy = axis[None, :, None] - center[:, 1, None, None]
    folds, turn, outer, inner = (table[shape][:, None, None] for table in (_FOLDS, _TURN, _OUTER, _INNER))
    r = radius[:, None, None]
    distance = torch.hypot(dx, dy)
    half = math.pi / folds
    angle = torch.atan2(dy, dx) - turn
    angle = (torch.remainder(angle + half, 2 * half) - half).abs()
    # The line through (outer, 0) and (inner at angle half), as its unit normal (nx, ny) and offset.
    nx, ny = inner * half.sin(), outer - inner * half.cos()
    norm = torch.hypot(nx, ny)
    line = (distance * (angle.cos() * nx + angle.sin() * ny) - r * outer * nx) / norm
    signed = torch.where(shape[:, None, None] == 0, distance - r, line)
    inside = (0.5 - signed * supersample).clamp(0, 1)
    return torch.nn.functional.avg_pool2d(inside[:, None], supersample)[:, 0]


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (x, y, radius) in pixels for each thing: inside the frame, apart, and true to the relation."""
    radii = [RADIUS[thing.size] * rng.uniform(0.94, 1.06) for thing in scene.things]
    if scene.relation is None:
        x, y = (rng.uniform(radii[0] + 2, RESOLUTION - radii[0] - 2) for _ in range(2))
        return [(x, y, radii[0])]
    # Lay out "first before second" along one axis, then turn it to the relation.
    swap = scene.relation in ("right of", "below")
    first, second = radii[::-1] if swap else radii
    free = RESOLUTION - 2 - 2 * (first + second) - 2
    gap = 2 + rng.uniform(0, free)
    start = 1 + rng.uniform(0, free + 2 - gap)
    along = [start + first, start + 2 * first + gap + second]
    reach = 0.4 * (along[1] - along[0])
    across = [rng.uniform(first + 1, RESOLUTION - 1 - first)]
    low, high = max(second + 1, across[0] - reach), min(RESOLUTION - 1 - second, across[0] + reach)
    across.append(rng.uniform(low, high) if low < high else (low + high) / 2)
    if swap:
        along.reverse()
        across.reverse()
    if scene.relation in ("above", "below"):
        along, across = across, along
    return list(zip(along, across, radii, strict=True))


def draw(
    color: torch.Tensor, shape: torch.Tensor, center: torch.Tensor, radius: torch.Tensor, supersample: int = 2
) -> torch.Tensor:
    """Paint K objects an image, in order: (B, 3, 64, 64) in [0, 1].

    `color` (B, K, 3) in [0, 1]; `shape` (B, K) indexes SHAPES, -1 for no object; `center` (B, K, 2), `radius` (B, K).
    """
    images = BACKGROUND[None, :, None, None].repeat(len(color), 1, RESOLUTION, RESOLUTION)
    for k in range(color.shape[1]):
        here = (shape[:, k] >= 0).nonzero()[:, 0]
        alpha = coverage(shape[here, k], center[here, k], radius[here, k], supersample)[:, None]
        images[here] = images[here] * (1 - alpha) + color[here, k, :, None, None] * alpha
    return images


@dataclass
class Layout:
    """Where and how K objects of B images are painted: the arguments of `draw`, to be edited before it."""

    color: torch.Tensor
    shape: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor

    def draw(self, supersample: int = 2) -> torch.Tensor:
        """Images (B, 3, 64, 64) in [0, 1]."""
        return draw(self.color, self.shape, self.center, self.radius, supersample)


def lay_out(scenes: Sequence[Scene], rng: np.random.Generator) -> Layout:
    """Random places for `scenes`, two slots an image."""
    shape = torch.full((len(scenes), 2), -1)
    color = torch.zeros(len(scenes), 2, 3)
    center, radius = torch.zeros(len(scenes), 2, 2), torch.zeros(len(scenes), 2)
    for i, scene in enumerate(scenes):
        for k, (thing, (x, y, r)) in enumerate(zip(scene.things, place(scene, rng), strict=True)):
            shape[i, k] = SHAPES.index(thing.shape)
            color[i, k] = PALETTE[COLORS.index(thing.color)]
            # Places are of the extent's middle; a triangle's and a star's centroid lie a little below it.
            center[i, k] = torch.tensor([x, y + r * float(_SHIFT[shape[i, k]])])
            radius[i, k] = r
    return Layout(color, shape, center, radius)


def render(scenes: Sequence[Scene], rng: np.random.Generator, supersample: int = 2) -> torch.Tensor:
    """Images (B, 3, 64, 64) in [0, 1] of `scenes`, with random places."""
    return lay_out(scenes, rng).draw(supersample)
