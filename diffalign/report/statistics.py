"""Figures with their uncertainty: paired differences, accuracies, diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.noise import generator

Kind = Literal["training", "heldout", "oracle", "diversity"]

_Z95 = 1.959963984540054


def is_oracle(name: str) -> bool:
    """Whether a reward is a calibrated oracle, told by its name: it is no learned model, and its mean is a share of
    correct images.
    """
    return name.endswith("oracle")


@dataclass(frozen=True)
class Figure:
    """One line of a comparison on the same prompts and the same starting noise.

    Attributes:
        name: what was measured.
        kind: what it was to the training; sets the order and the colour in the report.
        base, tuned: means over prompts, each prompt's own samples averaged first.
        difference: tuned - base.
        low, high: 95 % interval of the difference, paired; NaN with fewer than two prompts.
        n: number of prompts that both have valid values for.
        unit: "" or "%" (base, tuned and difference are then fractions that are shown in percent).
    """

    name: str
    kind: Kind
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    n: int
    unit: Literal["", "%"] = ""


def compare(
    name: str,
    kind: Kind,
    base: ArrayLike,
    tuned: ArrayLike,
    prompt_ids: Sequence[int | str],
    *,
    unit: Literal["", "%"] = "",
) -> Figure:
    """Compares paired samples: entry i of ``base`` and ``tuned`` has the same prompt and the same starting noise.

    A pair in which either value is NaN (a failed score) is left out.

    Args:
        name: what was measured.
        kind: what it was to the training.
        base: (N,) values before.
        tuned: (N,) values after.
        prompt_ids: (N,) prompt of each pair; several pairs of one prompt are averaged, for they are not independent.
        unit: "%" for fractions that are shown in percent.
    """
    before, after = _by_prompt(base, tuned, prompt_ids)
    low, high = bootstrap_interval(after - before)
    means = (float(x.mean()) if len(x) else math.nan for x in (before, after, after - before))
    return Figure(name, kind, *means, low, high, len(before), unit)


def _by_prompt(base: ArrayLike, tuned: ArrayLike, prompt_ids: Sequence[int | str]) -> tuple[NDArray, NDArray]:
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if not before.shape == after.shape == (len(prompt_ids),):
        raise ValueError(
            f"base has shape {before.shape}, tuned {after.shape} and there are {len(prompt_ids)} prompt ids: "
            "paired figures need one of each for every sample."
        )
    groups: dict[int | str, list[int]] = {}
    for index in np.flatnonzero(np.isfinite(before) & np.isfinite(after)):
        groups.setdefault(prompt_ids[index], []).append(index)
    return tuple(np.array([x[rows].mean() for rows in groups.values()]) for x in (before, after))


def bootstrap_interval(differences: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron, 1979), resampling prompts.

    Args:
        differences: (P,) one value a prompt.
        resamples: number of resampled means.
        seed: of the resampling; the interval is a function of the values and the seed.

    Returns:
        (low, high); NaN with fewer than two prompts, which say nothing about the spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    # Chunks keep the index table small for thousands of prompts.
    draw = generator(seed, "bootstrap")
    chunk = max(1, 2_000_000 // len(values))
    counts = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    means = np.concatenate([values[draw.integers(0, len(values), (n, len(values)))].mean(axis=1) for n in counts])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927), for the accuracy of one model; (NaN, NaN) for n = 0."""
    if n == 0:
        return math.nan, math.nan
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must lie between 0 and n.")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise distances (1 - cosine) of image features; 0 for equal images, about 1 for unrelated ones.

    Attributes:
        within: over pairs of images of one prompt, averaged over prompts; NaN if no prompt has two images. Falls when
            the noise no longer matters.
        overall: over all pairs of images. Falls when prompts no longer matter, or one style takes over.
        of_prompt: prompt id -> mean distance of its pairs, for prompts with two images or more.
    """

    within: float
    overall: float
    of_prompt: dict[int | str, float]


def diversity(features: ArrayLike, prompt_ids: Sequence[int | str]) -> Diversity:
    """Diversity of images from their features, e.g. `DualEncoder.image_features`.

    Args:
        features: (N, D); rows are normalised here.
        prompt_ids: (N,) the prompt of each image.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(prompt_ids):
        raise ValueError(f"features have shape {rows.shape} for {len(prompt_ids)} prompt ids: expected (N, D).")
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    groups: dict[int | str, list[int]] = {}
    for index, identity in enumerate(prompt_ids):
        groups.setdefault(identity, []).append(index)
    of_prompt = {identity: _mean_distance(rows[own]) for identity, own in groups.items() if len(own) > 1}
    within = float(np.mean(list(of_prompt.values()))) if of_prompt else math.nan
    return Diversity(within, _mean_distance(rows), of_prompt)


def _mean_distance(rows: NDArray) -> float:
    """Mean of 1 - <a, b> over pairs of unit rows, from the norm of their sum, without the N x N matrix."""
    n = len(rows)
    if n < 2:
        return math.nan
    total = rows.sum(axis=0)
    return float(1 - (total @ total - n) / (n * (n - 1)))


def expected_best(values: ArrayLike, counts: ArrayLike) -> NDArray:
    """The mean, over all ways to draw n of N values without replacement, of the highest one drawn: exactly.

    With r_(1) <= ... <= r_(N), E[max of n] = sum_i r_(i) C(i - 1, n - 1) / C(N, n): the i-th is the highest where it
    is drawn and the n - 1 others are below it. Unbiased for the best of n independent samples, without a bootstrap.

    Args:
        values: (N,) of independent samples.
        counts: (K,) values of n, each between 1 and N.

    Returns:
        (K,)
    """
    ordered, asked = np.sort(np.asarray(values, dtype=np.float64)), np.asarray(counts, dtype=int)
    if asked.size and not 1 <= asked.min() <= asked.max() <= len(ordered):
        raise ValueError(f"counts go from {asked.min()} to {asked.max()}: must lie between 1 and {len(ordered)}.")
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, len(ordered) + 1)).cumsum()])
    found = []
    for n in asked:
        below = np.arange(n - 1, len(ordered))  # how many values stand below the highest that is drawn
        log_share = log_factorial[below] - log_factorial[n - 1] - log_factorial[below - n + 1]
        log_share -= log_factorial[-1] - log_factorial[n] - log_factorial[len(ordered) - n]
        found.append(np.exp(log_share) @ ordered[n - 1 :])
    return np.array(found)
