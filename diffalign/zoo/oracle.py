"""The judge: does an image of the shapes world show what its prompt says? Programmed, never learned, never trained on.

A pixel is explained as background mixed with one palette colour; connected pixels of one colour are an object; its
shape is the template that overlaps best, its size follows from its area. An object without a palette colour or without
a clean shape is an object still: it counts, and satisfies no word.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from diffalign.zoo.render import AREA, BACKGROUND, PALETTE, RADIUS, coverage
from diffalign.zoo.world import COLORS, SHAPES, Scene, Thing, parse

MIN_CORE = 3  # pixels with all eight neighbours alike: less is an edge's fringe, not an object
MAX_RESIDUAL = 0.22  # of a pixel against the line from background to its colour, RGB in [0, 1]
MIN_OVERLAP = 0.80  # intersection over union with the best template
SMALL, LARGE = (RADIUS["small"] * RADIUS["medium"]) ** 0.5, (RADIUS["medium"] * RADIUS["large"]) ** 0.5


@dataclass(frozen=True)
class Found:
    """One object seen: `color` or `shape` is None where it is none of ours; `x`, `y`, `radius` in pixels."""

    color: str | None
    shape: str | None
    overlap: float
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """Small, medium or large, by the radius."""
        return "small" if self.radius < SMALL else "large" if self.radius > LARGE else "medium"


@dataclass(frozen=True)
class Verdicts:
    """For B images: `all_correct` (B,) bool, `fraction` (B,) of facts that hold, and each image's facts by name."""

    all_correct: torch.Tensor
    fraction: torch.Tensor
    facts: list[dict[str, bool]]


def judge(images: torch.Tensor, prompts: Sequence[str]) -> Verdicts:
    """Verdicts on images (B, 3, 64, 64) in [0, 1] and as many prompts of the grammar.

    Facts: `count`; `color i`, `shape i` and, where the prompt says one, `size i` of each thing; `relation`.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
    facts = [check(found, parse(prompt)) for found, prompt in zip(look(images), prompts, strict=True)]
    fraction = torch.tensor([sum(f.values()) / len(f) for f in facts])
    return Verdicts(torch.tensor([all(f.values()) for f in facts]), fraction, facts)


def check(found: Sequence[Found], scene: Scene) -> dict[str, bool]:
    """The facts of `scene`, each thing read from the object that fits it best (one object each)."""
    seats: list[Found | None] = [*found, *[None] * len(scene.things)]
    best = max(
        itertools.permutations(seats, len(scene.things)),
        key=lambda chosen: sum(_fit(o, t) for o, t in zip(chosen, scene.things, strict=True)),
    )
    facts = {"count": len(found) == len(scene.things)}
    for i, (seen, thing) in enumerate(zip(best, scene.things, strict=True), 1):
        facts[f"color {i}"] = seen is not None and seen.color == thing.color
        facts[f"shape {i}"] = seen is not None and seen.shape == thing.shape
        if thing.size != "medium":
            facts[f"size {i}"] = seen is not None and seen.size == thing.size
    if scene.relation is not None:
        facts["relation"] = None not in best and _stands(*best, scene.relation)
    return facts


def _fit(seen: Found | None, thing: Thing) -> float:
    if seen is None:
        return 0.0
    # Colour says best which object was meant; among equals the larger one.
    words = 4 * (seen.color == thing.color) + 2 * (seen.shape == thing.shape) + (seen.size == thing.size)
    return words + seen.radius / 99


def _stands(a: Found, b: Found, relation: str) -> bool:
    right, down = b.x - a.x, b.y - a.y
    along = {"left of": right, "right of": -right, "above": down, "below": -down}[relation]
    return along > min(abs(right), abs(down)) and along == max(abs(right), abs(down))


def look(images: torch.Tensor) -> list[list[Found]]:
    """The objects of each image (B, 3, 64, 64) in [0, 1]."""
    images = images.detach().float().cpu()
    kind, alpha = _explain(images)
    label = _components(kind)
    core = _core(kind)
    found: list[list[Found]] = [[] for _ in images]
    masks, owners = [], []
    for b in range(len(images)):
        ids, counts = label[b][core[b]].unique(return_counts=True)
        for component in ids[counts >= MIN_CORE]:
            mask = label[b] == component
            color = int(kind[b][mask][0]) - 1
            # The soft edge belongs to the object: one pixel more, by how much it is covered.
            wide = F.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0]
            masks.append(mask.float() if color == len(COLORS) else wide * alpha[b, color])
            owners.append((b, color))
    if masks:
        for (b, color), shape in zip(owners, _shapes(torch.stack(masks)), strict=True):
            found[b].append(Found(COLORS[color] if color < len(COLORS) else None, *shape))
    return found


def _explain(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per pixel: kind (B, 64, 64), 0 background, 1 + colour, or 7 for none of them; and coverage (B, 6, 64, 64)."""
    ray = PALETTE - BACKGROUND
    offset = images.movedim(1, -1) - BACKGROUND
    alpha = (offset @ ray.T / ray.square().sum(1)).clamp(0, 1)
    residual = (offset[..., None, :] - alpha[..., None] * ray).norm(dim=-1)
    least, color = residual.min(-1)
    amount = alpha.gather(-1, color[..., None])[..., 0]
    kind = torch.where(amount > 0.5, color + 1, 0)
    kind = torch.where(least > MAX_RESIDUAL, len(COLORS) + 1, kind)
    return kind, alpha.movedim(-1, 1)


def _components(kind: torch.Tensor) -> torch.Tensor:
    """Label (B, 64, 64): equal for pixels of one kind that touch by a side; 0 for the background."""
    height, width = kind.shape[1:]
    start = torch.arange(1, height * width + 1).view(1, height, width).expand_as(kind)
    label = torch.where(kind > 0, start, 0)
    same = {1: kind[:, 1:] == kind[:, :-1], 2: kind[:, :, 1:] == kind[:, :, :-1]}
    while True:
        before = label
        label = label.clone()
        for axis, equal in same.items():
            length = label.shape[axis] - 1
            first, second = label.narrow(axis, 0, length), label.narrow(axis, 1, length)
            top = torch.where(equal, torch.maximum(first, second), 0)
            first.copy_(torch.maximum(first, top))
            second.copy_(torch.maximum(second, top))
        if torch.equal(label, before):
            return label


def _core(kind: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 64, 64) that are not background and whose eight neighbours are of their kind."""
    k = F.pad(kind[:, None].float(), (1, 1, 1, 1), value=-1)
    same = (F.max_pool2d(k, 3, 1) == kind[:, None]) & (-F.max_pool2d(-k, 3, 1) == kind[:, None])
    return same[:, 0] & (kind > 0)


def _shapes(masks: torch.Tensor) -> list[tuple[str | None, float, float, float, float]]:
    """Shape (None if no template overlaps enough), overlap, x, y and radius of soft masks (N, 64, 64)."""
    axis = torch.arange(masks.shape[-1]) + 0.5
    area = masks.sum((1, 2))
    x = (masks.sum(1) * axis).sum(1) / area
    y = (masks.sum(2) * axis).sum(1) / area
    radius = (area[:, None] / AREA).sqrt()
    overlaps = []
    for shape in range(len(SHAPES)):
        template = coverage(torch.full((len(masks),), shape), torch.stack([x, y], 1), radius[:, shape], supersample=1)
        overlaps.append(torch.minimum(masks, template).sum((1, 2)) / torch.maximum(masks, template).sum((1, 2)))
    overlap, shape = torch.stack(overlaps, 1).max(1)
    return [
        (SHAPES[s] if o >= MIN_OVERLAP else None, o, cx, cy, float(r[s]))
        for s, o, cx, cy, r in zip(shape.tolist(), overlap.tolist(), x.tolist(), y.tolist(), radius, strict=True)
    ]
