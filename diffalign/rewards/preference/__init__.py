"""Rewards learned from preference pairs on frozen embeddings: likelihoods, the head, its training, the reward."""

from diffalign.rewards.preference.fit import Fitted, Pairs, encode_pairs, fit_preference, measure
from diffalign.rewards.preference.head import Likelihood, PreferenceHead
from diffalign.rewards.preference.likelihoods import bradley_terry, gaussian, rao_kupper
from diffalign.rewards.preference.reward import PreferenceReward, write_reward

__all__ = [
    "Fitted",
    "Likelihood",
    "Pairs",
    "PreferenceHead",
    "PreferenceReward",
    "bradley_terry",
    "encode_pairs",
    "fit_preference",
    "gaussian",
    "measure",
    "rao_kupper",
    "write_reward",
]
