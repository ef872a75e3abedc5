"""The type of recipe of MJ-VIDEO."""

from __future__ import annotations

from pathlib import Path

from diffalign.rewards.base import Reward
from diffalign.rewards.qwen_rewards.recipes import TunedRecipe
from diffalign.rewards.recipe import REWARD_TYPES


@REWARD_TYPES.register("mj_video")
class MJVideoRecipe(TunedRecipe):
    """MJ-VIDEO."""

    def build(self, folder: Path) -> Reward:
        """An `MJVideoReward`."""
        from diffalign.rewards.mj_video.reward import MJVideoReward

        return MJVideoReward(**self.how(folder))
