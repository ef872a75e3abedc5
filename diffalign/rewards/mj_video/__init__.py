"""MJ-VIDEO: InternVL2 with a mixture of experts on top rates videos."""

from diffalign.rewards.mj_video.reward import MJVideoReward

__all__ = ["MJVideoReward"]
