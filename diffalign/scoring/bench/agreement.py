"""How often the scores of a reward agree with people, under both conventions for ties, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.noise import generator
from diffalign.scoring.bench.preferences import Pair
from diffalign.scoring.bench.ties import TieCalibration

_RESAMPLES = 1_000


@dataclass(frozen=True)
class Agreement:
    """Of one reward with one set of labels. Accuracies are in [0, 1]; NaN where no pair is left.

    Attributes:
        pairs: that were judged.
        ties: how many of them people tied.
        left_out: pairs with an item that has no score.
        prompts: of the judged pairs.
        accuracy: of the pairs that people did not tie, the share that the larger score decides as they did; equal
            scores are wrong.
        low, high: its 95 % bootstrap interval over prompts; NaN for fewer than two.
        with_ties: of all pairs, see `TieCalibration`; equal to `accuracy` where people tied none.
        with_ties_low, with_ties_high: its interval; the threshold is chosen again in each resample.
        epsilon: the threshold of `with_ties`, in the units of the reward.
    """

    pairs: int
    ties: int
    left_out: int
    prompts: int
    accuracy: float
    low: float
    high: float
    with_ties: float
    with_ties_low: float
    with_ties_high: float
    epsilon: float


def agreement(pairs: Sequence[Pair], scores: Sequence[float | None], resamples: int = _RESAMPLES) -> Agreement:
    """The agreement of scores with people.

    Args:
        pairs: what people said.
        scores: of each item; None where there is none.
        resamples: of the bootstrap.
    """
    judged, differences = scored(pairs, scores)
    labels = np.array([pair.label for pair in judged])
    _, prompt = np.unique([pair.prompt for pair in judged], return_inverse=True)
    right, decided = labels * np.sign(differences) > 0, labels != 0
    calibration = TieCalibration(labels, differences)
    with_ties, epsilon = calibration.best()
    draws = np.array(
        [(_ratio(right, decided, weights), calibration.best(weights)[0]) for weights in _resampled(prompt, resamples)]
    )
    (low, high), (ties_low, ties_high) = _interval(draws)
    return Agreement(
        pairs=len(judged),
        ties=int((~decided).sum()),
        left_out=len(pairs) - len(judged),
        prompts=len(set(prompt.tolist())),
        accuracy=_ratio(right, decided, np.ones(len(judged))),
        low=low,
        high=high,
        with_ties=with_ties,
        with_ties_low=ties_low,
        with_ties_high=ties_high,
        epsilon=epsilon,
    )


def scored(pairs: Sequence[Pair], scores: Sequence[float | None]) -> tuple[list[Pair], NDArray]:
    """The pairs whose items both have a score, and (N,) the score of the first minus that of the second."""
    judged = [pair for pair in pairs if scores[pair.first] is not None and scores[pair.second] is not None]
    return judged, np.array([scores[pair.first] - scores[pair.second] for pair in judged], dtype=np.float64)


def _resampled(prompt: NDArray, resamples: int) -> Iterator[NDArray]:
    """How often each pair is in a resample that draws as many prompts as there are, with their pairs."""
    count = int(prompt.max()) + 1 if len(prompt) else 0
    if count < 2:
        return
    draw = generator(0, "bootstrap")
    for _ in range(resamples):
        times = np.bincount(draw.integers(0, count, count), minlength=count)
        yield times[prompt].astype(np.float64)


def _ratio(right: NDArray, decided: NDArray, weights: NDArray) -> float:
    total = float(weights @ decided)
    return float(weights @ right) / total if total else math.nan


def _interval(draws: NDArray) -> list[tuple[float, float]]:
    """Percentile intervals (Efron, 1979) of the two columns; resamples without any untied pair say nothing."""
    if not len(draws):
        return [(math.nan, math.nan)] * 2
    found = [column[np.isfinite(column)] for column in draws.T]
    return [tuple(np.quantile(x, [0.025, 0.975]).tolist()) if len(x) else (math.nan, math.nan) for x in found]
