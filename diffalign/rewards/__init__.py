"""Scorers of images: `load` one by name, make one of any function, add and scale them."""

import diffalign.rewards.recipe_types  # noqa: F401  registers the types
from diffalign.rewards.base import (
    FunctionReward,
    Reward,
    Score,
    as_reward,
    check_gradient,
)
from diffalign.rewards.combination import Combination, WeightedSum, weighted_sum
from diffalign.rewards.recipe import (
    REWARD_TYPES,
    REWARDS,
    RewardRecipe,
    load,
    read_recipe,
    reward_names,
    shipped_recipes,
)

__all__ = [
    "REWARDS",
    "REWARD_TYPES",
    "Combination",
    "FunctionReward",
    "Reward",
    "RewardRecipe",
    "Score",
    "WeightedSum",
    "as_reward",
    "check_gradient",
    "load",
    "read_recipe",
    "reward_names",
    "shipped_recipes",
    "weighted_sum",
]
