"""Rewards of Qwen2-VL with a head: HPSv3 on images, VideoReward on videos."""

from diffalign.rewards.qwen_rewards.hpsv3 import HPSv3Reward
from diffalign.rewards.qwen_rewards.video_reward import VideoReward

__all__ = ["HPSv3Reward", "VideoReward"]
