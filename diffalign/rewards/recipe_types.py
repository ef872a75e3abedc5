"""The types of reward recipe. Each imports its scorer when it is built: listing rewards loads no model library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, located


class EncoderRecipe(RewardRecipe):
    """A scorer on an encoder of images and text."""

    path: str = Field(min_length=1, description="zoo:NAME, a folder (relative to this file), a hub id, or open_clip's")
    library: Literal["transformers", "open_clip"] = "transformers"
    processor: str | None = Field(
        None, description="where tokenizer and image processor are, if not beside the weights"
    )
    revision: str | None = Field(None, description="of the hub repository")

    def where(self, folder: Path) -> dict[str, object]:
        """Arguments of `load_encoder`."""
        if self.library == "open_clip":
            return {"path": self.path, "library": self.library}
        processor = self.processor and located(self.processor, folder)
        return {"path": located(self.path, folder), "processor": processor, "revision": self.revision}


@REWARD_TYPES.register("clip")
class ClipRecipe(EncoderRecipe):
    """Cosine of image and prompt."""

    def build(self, folder: Path) -> Reward:
        """A `CLIPReward`."""
        from diffalign.rewards.clip import CLIPReward

        return CLIPReward(name=self.name, **self.where(folder))


@REWARD_TYPES.register("pickscore")
class PickScoreRecipe(EncoderRecipe):
    """exp(logit_scale) x cosine."""

    def build(self, folder: Path) -> Reward:
        """A `PickScoreReward`."""
        from diffalign.rewards.clip import PickScoreReward

        return PickScoreReward(name=self.name, **self.where(folder))


@REWARD_TYPES.register("aesthetic")
class AestheticRecipe(EncoderRecipe):
    """A small head on the image's embedding."""

    head: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")

    def build(self, folder: Path) -> Reward:
        """An `AestheticReward`."""
        from diffalign.rewards.aesthetic import AestheticReward

        return AestheticReward(head=located(self.head, folder), name=self.name, **self.where(folder))


@REWARD_TYPES.register("hps")
class HpsRecipe(RewardRecipe):
    """HPSv2 or HPSv2.1."""

    checkpoint: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")
    base: str = Field(description="the CLIP that it was tuned from: its sizes and its tokenizer")

    def build(self, folder: Path) -> Reward:
        """An `HPSReward`."""
        from diffalign.rewards.hps import HPSReward

        return HPSReward(located(self.checkpoint, folder), located(self.base, folder), name=self.name)
