"""What a scene says, as bits: the lesson by which text and image towers learn who stands where.

`left of` tells nothing by itself, nor does the order of the objects: only both together do, and gradient descent on
pictures alone spends thousands of steps before it notices. A linear reader of these bits points at them from the first
step, and is thrown away afterwards.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from diffalign.zoo.world import COLORS, RELATIONS, SHAPES, SIZES, Scene, mirrored

PLACES = (None, *RELATIONS)
"""Where an object stands, seen from the other one; None for an object alone."""
_EACH = len(COLORS) + len(SHAPES) + len(SIZES)
COUNT = len(PLACES) * _EACH
"""For each place: which colour, shape and size stand there."""


def facts(scene: Scene) -> torch.Tensor:
    """(2, COUNT) of 0 and 1: what `scene` says of each object, in the place where it stands; zeros for none."""
    rows = torch.zeros(2, len(PLACES), _EACH)
    for row, side in zip(rows, (scene, mirrored(scene)) if scene.relation else (scene,), strict=False):
        thing, at = side.things[0], row[PLACES.index(side.relation)]
        at[COLORS.index(thing.color)] = 1
        at[len(COLORS) + SHAPES.index(thing.shape)] = 1
        at[len(COLORS) + len(SHAPES) + SIZES.index(thing.size)] = 1
    return rows.flatten(1)


def bits(scenes: Sequence[Scene]) -> torch.Tensor:
    """All facts of each scene: (B, COUNT), the same from either object's side."""
    return torch.stack([facts(scene).sum(0) for scene in scenes])


class Reader(nn.Linear):
    """Reads the bits from features (..., width); its loss is the lesson."""

    def __init__(self, width: int) -> None:
        super().__init__(width, COUNT)

    def loss(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean binary cross-entropy of features (..., width) and bits that broadcast to (..., COUNT)."""
        logits = self(features)
        return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits))
