"""Rewards of noisy latents, for guidance: trunk, heads, choices to learn from, accuracy by noise level."""

from diffalign.rewards.noisy.choices import LEVELS, Choices, margin, noised, tie_margins
from diffalign.rewards.noisy.head import NoisyHead
from diffalign.rewards.noisy.measure import SIGMAS, accuracies, ranked_right
from diffalign.rewards.noisy.reward import NoisyReward
from diffalign.rewards.noisy.trunk import Trunk, trunk_of

__all__ = [
    "LEVELS",
    "SIGMAS",
    "Choices",
    "NoisyHead",
    "NoisyReward",
    "Trunk",
    "accuracies",
    "margin",
    "noised",
    "ranked_right",
    "tie_margins",
    "trunk_of",
]
