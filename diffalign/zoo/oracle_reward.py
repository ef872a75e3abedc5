"""The shapes-world oracle as a reward that judges: gold, not differentiable, never trained on and never selected by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.rewards import Reward
from diffalign.zoo.oracle import judge


class ShapesOracle(Reward):
    """1 where an image shows everything that its prompt says and nothing else, 0 where it does not.

    A prompt outside the grammar of the shapes world is a failed score, not a 0.
    """

    name = "shapes-oracle"
    differentiable = False

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) in {0, 1} of images (B, 3, 64, 64) in [0, 1]."""
        return judge(images, prompts).all_correct.float()
