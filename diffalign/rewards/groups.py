"""Rewards of different scales on one, within the samples of one prompt: the sum of GRPO's advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.combination import Combination, Rows, check_terms, weighted_names

_EPSILON = 1e-8
_ROUNDING = 1e-6
"""A standard deviation below this share of the rewards' size is rounding."""


def infinite_where_rounding(std: Tensor, rewards: Tensor) -> Tensor:
    """Standard deviations (P, 1) of the rows of (P, G) rewards, NaN left out; by inf nothing is left of a deviation."""
    return std.where(std > _ROUNDING * rewards.abs().nan_to_num(0).amax(1, keepdim=True), torch.inf)


class GroupStandardised(Combination):
    """sum_k w_k (r_k - m_k) / (s_k + 1e-8): m_k and s_k are mean and standard deviation of r_k in the prompt's group.

    Each reward has its say whatever its scale, which a sum of rewards that is standardised afterwards does not give. It
    is the sum of GRPO's advantages over several rewards: by it the code of DanceGRPO (Xue et al. 2025,
    arXiv:2505.07818) chooses the best and the worst of a group, and its N - 1 under the standard deviation and its 1e-8
    are these. GDPO (arXiv:2601.05242) standardises the sum over the batch besides.

    Departures: there each term, cut off at 5, has a clipped loss of its own, and the losses are summed with the
    weights: which is the same but for large terms, and where the ratio leaves the clip range and terms differ in sign.
    A sample alone in its group, which has no standard deviation, gets NaN there and here 0, its distance from the mean.

    Groups are the samples of equal prompts in one call, and failed samples leave them. Where all of a group are equal
    up to rounding, to a millionth of their size, they get 0. No gradient: the sum over a group is 0 whatever its
    pixels are.

    Args:
        terms: (reward, weight) pairs.
        name: default: ``group-z(a) + 0.5*group-z(b)``.
    """

    def __init__(self, terms: Sequence[tuple[Reward, float]], name: str | None = None) -> None:
        check_terms(terms)
        super().__init__([reward for reward, _ in terms], name or " + ".join(weighted_names(terms, "group-z({})")))
        self.weights = [float(weight) for _, weight in terms]
        self.differentiable = False
        self.groupwise = True
        self.needs = tuple(dict.fromkeys((*self.needs, "prompt")))

    def combine(self, rows: Rows) -> Tensor:
        """sum_k w_k (r_k - m_k) / (s_k + 1e-8), group by group."""
        values = rows.values.double().cpu()  # a few numbers, and not every device has float64
        weights = torch.tensor(self.weights, dtype=torch.float64)
        total = torch.zeros_like(values[0])
        for index in prompt_groups(rows.prompts):
            group = values[:, index]
            if len(index) > 1:
                std = infinite_where_rounding(group.std(dim=1, keepdim=True), group)
                total[index] = weights @ ((group - group.mean(dim=1, keepdim=True)) / (std + _EPSILON))
        return total.to(rows.values)


def prompt_groups(prompts: Sequence[str]) -> list[list[int]]:
    """The indices of the samples of each prompt, wherever they stand."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    return list(groups.values())
