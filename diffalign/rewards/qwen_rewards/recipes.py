"""The types of recipe of Qwen2-VL rewards. Each imports its scorer when it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, located


class TunedRecipe(RewardRecipe):
    """A checkpoint that was tuned from a vision-language model."""

    checkpoint: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")
    base: str = Field(description="the model that it was tuned from: its sizes, tokenizer and processor, no weights")
    revision: str | None = Field(None, description="of the base's hub repository")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: PositiveInt | None = Field(None, description="in one forward pass; it does not change the result")

    def how(self, folder: Path) -> dict[str, Any]:
        """Arguments of the reward."""
        import torch

        size = {} if self.batch_size is None else {"batch_size": self.batch_size}
        places = {"checkpoint": located(self.checkpoint, folder), "base": located(self.base, folder)}
        return places | {"name": self.name, "revision": self.revision, "dtype": getattr(torch, self.dtype)} | size


@REWARD_TYPES.register("hpsv3")
class HPSv3Recipe(TunedRecipe):
    """HPSv3."""

    def build(self, folder: Path) -> Reward:
        """An `HPSv3Reward`."""
        from diffalign.rewards.qwen_rewards.hpsv3 import HPSv3Reward

        return HPSv3Reward(**self.how(folder))


@REWARD_TYPES.register("video_reward")
class VideoRewardRecipe(TunedRecipe):
    """VideoReward."""

    config: str | None = Field(
        None, description="model_config.json (relative to this file); default: that of the folder above the checkpoint"
    )

    def build(self, folder: Path) -> Reward:
        """A `VideoReward`."""
        from diffalign.rewards.qwen_rewards.video_reward import VideoReward

        return VideoReward(**self.how(folder), config=None if self.config is None else located(self.config, folder))
