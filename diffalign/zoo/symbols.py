"""What a scene says, as bits: the extra lesson by which text and image towers learn who stands where.

`left of` tells nothing by itself, nor does the order of the objects: only both together do, and gradient descent on
pictures alone spends thousands of steps before it notices. A linear reader of these bits, trained along and then
thrown away, points at them from the first step.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from diffalign.zoo.world import COLORS, INVERSE, RELATIONS, SHAPES, SIZES, Scene

_EACH = 1 + len(SHAPES) + len(SIZES) + len(RELATIONS)
COUNT = len(COLORS) * _EACH
"""For each colour: is it there; with which shape and size; where does it stand, seen from the other object."""


def bits(scene: Scene) -> torch.Tensor:
    """The facts of `scene`: (COUNT,) of 0 and 1, the same from either object's side."""
    facts = torch.zeros(len(COLORS), _EACH)
    sides = [scene.relation, INVERSE[scene.relation]] if scene.relation else [None]
    for thing, side in zip(scene.things, sides, strict=True):
        row = facts[COLORS.index(thing.color)]
        row[0] = 1
        row[1 + SHAPES.index(thing.shape)] = 1
        row[1 + len(SHAPES) + SIZES.index(thing.size)] = 1
        if side is not None:
            row[1 + len(SHAPES) + len(SIZES) + RELATIONS.index(side)] = 1
    return facts.flatten()


class Reader(nn.Linear):
    """Reads the bits from features (B, width); its loss is the lesson."""

    def __init__(self, width: int) -> None:
        super().__init__(width, COUNT)

    def loss(self, features: torch.Tensor, scenes: Sequence[Scene | None]) -> torch.Tensor:
        """Mean binary cross-entropy of the scenes; rows without a scene (empty captions) do not count."""
        rows = [i for i, scene in enumerate(scenes) if scene is not None]
        target = torch.stack([bits(scene) for scene in scenes if scene is not None])
        return F.binary_cross_entropy_with_logits(self(features[rows]), target)
