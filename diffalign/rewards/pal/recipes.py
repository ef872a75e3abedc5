"""The type of recipe of a PAL model. It imports its scorer when it is built."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, located
from diffalign.rewards.recipe_types import EncoderRecipe


@REWARD_TYPES.register("pal")
class PalRecipe(EncoderRecipe):
    """A mixture of tastes that was trained on the choices of known users, on the encoder's embeddings."""

    weights: str = Field(description="a safetensors file (relative to this one), or OWNER/NAME/FILE on the hub")

    def build(self, folder: Path) -> Reward:
        """A `PalReward`."""
        from diffalign.rewards.pal.reward import PalReward

        return PalReward(head=located(self.weights, folder), name=self.name, **self.where(folder))
