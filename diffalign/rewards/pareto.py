"""Pareto ranks: several rewards compared without a common scale, within the samples of one prompt.

Non-dominated sorting and crowding distance are those of NSGA-II: Deb, Pratap, Agarwal and Meyarivan (2002), "A fast and
elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on Evolutionary Computation 6(2), 182-197.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.rewards.combination import Combination, Rows
from diffalign.rewards.ensembles import Members, call_name
from diffalign.rewards.groups import prompt_groups


class ParetoRank(Combination):
    """The share of a prompt's other samples that a sample beats, ties counting half; in [0, 1], a group's mean is 1/2.

    A sample beats another if its front is better (`fronts`), or on the same front if its surroundings are emptier
    (`crowding_distance`): NSGA-II's crowded comparison. Scales do not matter: fronts read the order of each
    member's scores alone, crowding their gaps over their range. Groups are the samples of equal prompts in one call;
    failed samples leave them, and a sample alone in its group gets 1/2. No gradient: ranks are steps.

    Args:
        members: the rewards, all to be maximised.
        name: default: made of the members' names.
    """

    def __init__(self, members: Members, name: str | None = None) -> None:
        super().__init__(members, name or call_name("pareto", members))
        self.differentiable = False
        self.groupwise = True
        self.needs = tuple(dict.fromkeys((*self.needs, "prompt")))

    def combine(self, rows: Rows) -> Tensor:
        """Shares of beaten samples, group by group."""
        values = rows.values.double().cpu()  # sorting asks for numbers at every front
        ranks = torch.empty_like(values[0])
        for index in prompt_groups(rows.prompts):
            ranks[index] = _share_beaten(values[:, index]).to(ranks)
        return ranks.to(rows.values)


def _share_beaten(values: Tensor) -> Tensor:
    front = fronts(values)
    crowding = crowding_distance(values, front)
    same = front[:, None] == front
    beats = (front[:, None] < front) | same & (crowding[:, None] > crowding)
    ties = same & (crowding[:, None] == crowding)
    count = values.shape[1]
    if count == 1:
        return values.new_full((1,), 0.5)
    return (beats.sum(dim=1) + 0.5 * (ties.sum(dim=1) - 1)) / (count - 1)  # less the tie with itself


def fronts(values: Tensor) -> Tensor:
    """The front of each sample, non-dominated sorting: 0 is the Pareto front, 1 that without 0, ...

    One sample dominates another if it is at least as good in every reward and better in one.

    Args:
        values: (K, N), to be maximised.

    Returns:
        (N,) int64.
    """
    first, second = values[:, :, None], values[:, None, :]
    dominates = (first >= second).all(dim=0) & (first > second).any(dim=0)
    front = torch.full((values.shape[1],), -1, device=values.device)
    number = 0
    while (left := front < 0).any():
        dominated = (dominates & left[:, None]).any(dim=0)
        front[left & ~dominated] = number
        number += 1
    return front


def crowding_distance(values: Tensor, front: Tensor) -> Tensor:
    """How empty a sample's surroundings on its front are: sum_k of the gap between its neighbours in
    reward k over the range of the front in reward k; infinite at either end of a reward.

    Departure: the neighbours are the next lower and the next higher value on the front. Where no two samples of a
    front have an equal score that is theirs; where they have, theirs depends on the order of the samples. A reward in
    which the whole front is equal adds nothing.

    Args:
        values: (K, N), to be maximised.
        front: (N,), of each sample: `fronts`.

    Returns:
        (N,) float.
    """
    distance = torch.zeros_like(values[0])
    for number in front.unique().tolist():
        index = (front == number).nonzero().flatten()
        for reward in values[:, index]:
            levels, level = reward.unique(sorted=True, return_inverse=True)
            if len(levels) > 1:
                gap = torch.full_like(levels, math.inf)
                gap[1:-1] = (levels[2:] - levels[:-2]) / (levels[-1] - levels[0])
                distance[index] += gap[level]
    return distance
