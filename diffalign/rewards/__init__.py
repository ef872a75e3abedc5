"""Scorers of images: `load` one by name, make one of any function, add and scale them."""

# These register the types of recipes.
import diffalign.rewards.mj_video.recipes
import diffalign.rewards.pal.recipes
import diffalign.rewards.qwen_rewards.recipes
import diffalign.rewards.recipe_combinations
import diffalign.rewards.recipe_content
import diffalign.rewards.recipe_sets
import diffalign.rewards.recipe_types
import diffalign.rewards.vlm.recipes  # noqa: F401
from diffalign.rewards.base import (
    FunctionReward,
    Reward,
    Score,
    as_reward,
    check_gradient,
)
from diffalign.rewards.combination import Combination, WeightedSum, weighted_sum
from diffalign.rewards.combine import Gate, Harmonic, Hinge
from diffalign.rewards.constraints import Lagrangian
from diffalign.rewards.ensembles import (
    InverseVariance,
    Mean,
    SoftMin,
    UncertaintyWeighted,
    WorstCase,
    mean,
    minimum,
)
from diffalign.rewards.groups import GroupStandardised, infinite_where_rounding
from diffalign.rewards.pareto import ParetoRank
from diffalign.rewards.recipe import (
    REWARD_TYPES,
    REWARDS,
    RewardRecipe,
    load,
    read_recipe,
    reward_names,
    shipped_recipes,
)
from diffalign.rewards.references import PAR, LogSigmoid, reference_rewards
from diffalign.rewards.sets import SetCredit, SetReward, pooled
from diffalign.rewards.statistics import StandardisedSum, Statistics, measure

__all__ = [
    "PAR",
    "REWARDS",
    "REWARD_TYPES",
    "Combination",
    "FunctionReward",
    "Gate",
    "GroupStandardised",
    "Harmonic",
    "Hinge",
    "InverseVariance",
    "Lagrangian",
    "LogSigmoid",
    "Mean",
    "ParetoRank",
    "Reward",
    "RewardRecipe",
    "Score",
    "SetCredit",
    "SetReward",
    "SoftMin",
    "StandardisedSum",
    "Statistics",
    "UncertaintyWeighted",
    "WeightedSum",
    "WorstCase",
    "as_reward",
    "check_gradient",
    "infinite_where_rounding",
    "load",
    "mean",
    "measure",
    "minimum",
    "pooled",
    "read_recipe",
    "reference_rewards",
    "reward_names",
    "shipped_recipes",
    "weighted_sum",
]
