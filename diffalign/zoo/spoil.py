"""Images that no caption says rightly, and the roughness of generated ones: rewards that saw both are robust."""

import numpy as np
import torch
from torch.nn import functional as F

from diffalign.zoo.render import BACKGROUND, PALETTE, RESOLUTION, Layout, lay_out
from diffalign.zoo.world import Scene


def distract(scene: Scene, rng: np.random.Generator) -> torch.Tensor:
    """One image (3, 64, 64) that looks like `scene` and is wrong: see the branches for the ways."""
    layout = lay_out([scene], rng)
    way = rng.integers(5)
    if way == 0:  # an object too many
        return _with_extra(layout, rng).draw(supersample=1)[0]
    if way == 1:  # an object too few
        layout.shape[0, rng.integers(len(scene.things))] = -1
        return layout.draw(supersample=1)[0]
    victim = int(rng.integers(len(scene.things)))
    other = Layout(layout.color.clone(), layout.shape.clone(), layout.center, layout.radius)
    if way == 2:  # two shapes mixed into one
        other.shape[0, victim] = (other.shape[0, victim] + rng.integers(1, 4)) % 4
        return layout.draw(supersample=1)[0] * 0.5 + other.draw(supersample=1)[0] * 0.5
    if way == 3:  # half of one colour, half of another
        old = int((PALETTE - layout.color[0, victim]).abs().sum(1).argmin())
        other.color[0, victim] = PALETTE[(old + rng.integers(1, len(PALETTE))) % len(PALETTE)]
        axis = int(rng.integers(2))
        half = (torch.arange(RESOLUTION) < layout.center[0, victim, axis]).float()
        half = half if axis == 0 else half[:, None]
        return layout.draw(supersample=1)[0] * half + other.draw(supersample=1)[0] * (1 - half)
    return _smear(layout.draw(supersample=1)[0], rng)  # no clear shape at all


def bend(scene: Scene, rng: np.random.Generator) -> torch.Tensor:
    """One image (3, 64, 64) of `scene` in which one outline is not quite its shape: pushed about, or grown a bump."""
    layout = lay_out([scene], rng)
    if rng.random() < 0.5:
        return _smear(layout.draw(supersample=1)[0], rng, amount=rng.uniform(0.03, 0.07), cells=10)
    victim = int(rng.integers(len(scene.things)))
    center, radius = layout.center[:, [victim]], layout.radius[:, [victim]]
    turn, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.9)
    bump = Layout(
        torch.cat([layout.color, layout.color[:, [victim]]], 1),
        torch.cat([layout.shape, torch.tensor([[int(rng.integers(4))]])], 1),
        torch.cat([layout.center, center + reach * radius * torch.tensor([np.cos(turn), np.sin(turn)])], 1).float(),
        torch.cat([layout.radius, radius * rng.uniform(0.6, 0.9)], 1).float(),
    )
    return bump.draw(supersample=1)[0]


def _with_extra(layout: Layout, rng: np.random.Generator) -> Layout:
    spot = torch.from_numpy(rng.uniform(8, RESOLUTION - 8, (1, 1, 2))).float()
    return Layout(
        torch.cat([layout.color, PALETTE[rng.integers(len(PALETTE))].view(1, 1, 3)], 1),
        torch.cat([layout.shape, torch.tensor([[int(rng.integers(4))]])], 1),
        torch.cat([layout.center, spot], 1),
        torch.cat([layout.radius, torch.tensor([[rng.uniform(5, 11)]]).float()], 1),
    )


def _smear(image: torch.Tensor, rng: np.random.Generator, amount: float = 0.2, cells: int = 6) -> torch.Tensor:
    """Push pixels along a smooth random field, by `amount` half widths: at 0.2, until shapes are blobs."""
    field = torch.from_numpy(rng.normal(0, amount, (1, 2, cells, cells))).float()
    field = F.interpolate(field, size=(RESOLUTION, RESOLUTION), mode="bicubic", align_corners=False)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, RESOLUTION, RESOLUTION], align_corners=False)
    moved = F.grid_sample(
        image[None] - BACKGROUND.view(1, 3, 1, 1), grid + field.permute(0, 2, 3, 1), align_corners=False
    )
    return moved[0] + BACKGROUND.view(3, 1, 1)


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, blur, tint and add coarse and fine noise, each image by its own amount: (B, 3, 64, 64) in [0, 1]."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, :2] *= uniform(0.96, 1.04, 1, 1)
    theta[:, :, 2] = uniform(-0.04, 0.04, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(soft, uniform(-0.4, 0.9, 1, 1, 1))
    images = images * uniform(0.94, 1.04, 3, 1, 1) + uniform(-0.03, 0.03, 3, 1, 1)
    coarse = F.interpolate(torch.randn(len(images), 3, 16, 16, generator=generator), scale_factor=4, mode="bilinear")
    fine = torch.randn(images.shape, generator=generator)
    return (images + uniform(0, 0.05, 1, 1, 1) * coarse + uniform(0, 0.04, 1, 1, 1) * fine).clamp(0, 1)
