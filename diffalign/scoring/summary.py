"""What came of each reward: how many scores, why the others failed, the mean and how well it is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.report import bootstrap_interval

_DRAWS = 50_000_000  # of the bootstrap; more prompts get fewer resamples, and need fewer


@dataclass(frozen=True)
class RewardSummary:
    """Of one reward.

    Attributes:
        name: the reward's.
        n: rows with a score.
        failures: rows without.
        reasons: the most frequent reasons with their counts, at most five.
        mean: over prompts, each prompt's own scores averaged first; rows without a prompt count each as one. NaN for
            n = 0.
        low, high: 95 % bootstrap interval of the mean over prompts; NaN for fewer than two.
        prompts: how many prompts have a score.
    """

    name: str
    n: int
    failures: int
    reasons: list[tuple[str, int]]
    mean: float
    low: float
    high: float
    prompts: int


def summarise(
    name: str, values: Sequence[float | None], reasons: Sequence[str | None], prompts: Sequence[str | None]
) -> RewardSummary:
    """The summary of a reward's column; entry i of each argument is of row i."""
    groups: dict[str | int, list[float]] = {}
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        if value is not None:
            groups.setdefault(row if prompt is None else prompt, []).append(value)
    means = np.array([np.mean(scores) for scores in groups.values()])
    resamples = min(10_000, max(1_000, _DRAWS // max(1, len(means))))
    low, high = bootstrap_interval(means, resamples=resamples)
    failed = Counter(reason for reason in reasons if reason is not None)
    return RewardSummary(
        name=name,
        n=sum(map(len, groups.values())),
        failures=failed.total(),
        reasons=most_frequent(failed),
        mean=float(means.mean()) if len(means) else math.nan,
        low=low,
        high=high,
        prompts=len(means),
    )


def most_frequent(reasons: Counter[str]) -> list[tuple[str, int]]:
    """The five most frequent reasons with their counts, in an order that stands."""
    return sorted(reasons.most_common(5), key=lambda pair: (-pair[1], pair[0]))
