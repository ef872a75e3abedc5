"""Rewards measured against what other samples of the same prompt get: PAR and the log-sigmoid conjunction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.rewards.base import Reward, Score
from diffalign.rewards.combination import Combination, Rows, check_terms, weighted_names

References = Mapping[str, float | Sequence[float]] | str
"""Rewards of reference samples: prompt -> number or numbers, or the key of the metadata that holds them."""


def reference_rewards(prompts: Sequence[str], score: Score) -> dict[str, list[float]]:
    """The valid scores of each prompt's samples, such as those of the untrained model: what `PAR` is centred by."""
    found: dict[str, list[float]] = {}
    for prompt, value, valid in zip(prompts, score.value.tolist(), score.valid.tolist(), strict=True):
        if valid:
            found.setdefault(prompt, []).append(value)
    return found


class PAR(Combination):
    """(1/M) sum_m sigmoid(r - r_m), r_m the rewards of M reference samples of the same prompt.

    Preference as reward: Fu et al. (2025), arXiv:2502.18770. Under Bradley-Terry it is the probability that the sample
    is preferred to a reference. In (0, 1), steepest where the sample is as good as the references, and flat far above
    them. One reference is enough for them. The mean is of the sigmoids, as in their code, not the sigmoid
    of the mean reference; r is a Bradley-Terry score in nats, so scale others first (`WeightedSum`). A prompt
    without a reference is a failed score; their code lets its raw reward through.

    Args:
        reward: the member.
        references: prompt -> r_m, one or several, as `reference_rewards` gives; or the key of the metadata with them.
        name: default: ``par(a)``.
    """

    def __init__(self, reward: Reward, references: References, name: str | None = None) -> None:
        super().__init__([reward], name or f"par({reward.name})")
        self.needs = _needs(self.needs, references)
        self.references = _checked(references)

    def unfit(self, rows: Rows) -> dict[int, str]:
        """Samples whose prompt has no reference."""
        return _without(self.references, rows)

    def combine(self, rows: Rows) -> Tensor:
        """(1/M) sum_m sigmoid(r - r_m)."""
        known = (_look_up(self.references, rows, i) for i in range(len(rows.prompts)))
        (values,) = rows.values
        return torch.stack(
            [(value - value.new_tensor(r)).sigmoid().mean() for value, r in zip(values, known, strict=True)]
        )


class LogSigmoid(Combination):
    """sum_k w_k log sigmoid((r_k - tau_k) / s_k): a soft AND, in nats, at most 0.

    Wang et al. (2024), arXiv:2402.00742, with w_k = s_k = 1: log of the probability that the sample is good in every
    property, each independently with probability sigmoid(r_k - tau_k). What is bad already weighs most: the slope in
    r_k falls from w_k / s_k far below tau_k to 0 far above. They take for tau_k a quantile (0.85) of the untrained
    model's rewards, for each prompt; one number for all prompts is our addition, and so is s_k, for rewards that are
    not in nats.

    Args:
        terms: (reward, weight) pairs, weights above 0.
        thresholds: reward name -> tau_k: a number, prompt -> number, or the key of the metadata that holds it.
        scales: reward name -> s_k > 0, in units of the reward; 1 where it is absent.
        name: default: made of the members' names.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Reward, float]],
        thresholds: Mapping[str, float | Mapping[str, float] | str],
        scales: Mapping[str, float] | None = None,
        name: str | None = None,
    ) -> None:
        check_terms(terms, positive=True)
        members = [reward for reward, _ in terms]
        absent = [reward.name for reward in members if reward.name not in thresholds]
        if absent:
            raise ValueError(f"no threshold of reward {absent[0]!r}; there are thresholds of {[*thresholds]}.")
        super().__init__(members, name or f"logsigmoid({', '.join(weighted_names(terms))})")
        self.weights = [float(weight) for _, weight in terms]
        self.scales = [float((scales or {}).get(reward.name, 1.0)) for reward in members]
        if not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise ValueError(f"scales {self.scales} of a log-sigmoid: each must be a number above 0.")
        given = [thresholds[reward.name] for reward in members]
        self.needs = _needs(self.needs, *given)
        self.thresholds = [_checked(threshold) for threshold in given]

    def unfit(self, rows: Rows) -> dict[int, str]:
        """Samples whose prompt has no threshold of some member, or several."""
        failed: dict[int, str] = {}
        for threshold in self.thresholds:
            failed = _without(threshold, rows, single=True) | failed
        return failed

    def combine(self, rows: Rows) -> Tensor:
        """sum_k w_k log sigmoid((r_k - tau_k) / s_k)."""
        total = torch.zeros_like(rows.values[0])
        for weight, scale, threshold, value in zip(
            self.weights, self.scales, self.thresholds, rows.values, strict=True
        ):
            tau = value.new_tensor([_look_up(threshold, rows, i)[0] for i in range(len(value))])
            total = total + weight * logsigmoid((value - tau) / scale)
        return total


_Known = float | dict[str, list[float]] | str


def _needs(needs: tuple[str, ...], *references: float | References) -> tuple[str, ...]:
    """What the references read, after what the members do."""
    read = (r if isinstance(r, str) else "prompt" for r in references if isinstance(r, str | Mapping))
    return tuple(dict.fromkeys((*needs, *read)))


def _checked(references: float | References) -> _Known:
    if isinstance(references, str):
        return references
    if isinstance(references, Mapping):
        return {prompt: _numbers(given) for prompt, given in references.items()}
    return _numbers(references)[0]


def _look_up(references: _Known, rows: Rows, index: int) -> list[float]:
    """The numbers of one sample. ValueError, in words, where there are none."""
    if isinstance(references, float):
        return [references]
    if isinstance(references, str):
        if references not in rows.metadata[index]:
            raise ValueError(f"its metadata has no {references!r}")
        return _numbers(rows.metadata[index][references])
    if rows.prompts[index] not in references:
        raise ValueError(f"no reference reward of prompt {rows.prompts[index]!r}")
    return references[rows.prompts[index]]


def _numbers(given: Any) -> list[float]:
    numbers = list(given) if isinstance(given, list | tuple) else [given]
    good = [isinstance(number, int | float) and math.isfinite(number) for number in numbers]
    if not numbers or not all(good):
        raise ValueError(f"reference reward {given!r} is not one or more finite numbers")
    return [float(number) for number in numbers]


def _without(references: _Known, rows: Rows, single: bool = False) -> dict[int, str]:
    """Samples of which `_look_up` finds nothing, or several where it must be a ``single`` number: index -> why."""
    failed: dict[int, str] = {}
    for i in range(len(rows.prompts)):
        try:
            count = len(_look_up(references, rows, i))
        except ValueError as error:
            failed[i] = str(error)
        else:
            if single and count > 1:
                failed[i] = f"it has {count} thresholds, and a threshold is one number"
    return failed
