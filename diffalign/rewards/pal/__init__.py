"""PAL: rewards that differ from user to user, learned from choices and met again from a few of them."""

from diffalign.rewards.pal.fit import UserPairs, fit_pal, fit_user, measure_pal
from diffalign.rewards.pal.model import PalModel, Variant
from diffalign.rewards.pal.reward import PalReward, write_pal

__all__ = [
    "PalModel",
    "PalReward",
    "UserPairs",
    "Variant",
    "fit_pal",
    "fit_user",
    "measure_pal",
    "write_pal",
]
