"""Accuracies with and without ties against their definitions, closed forms and resampling theory."""

import math

import numpy as np
import pytest

from diffalign.scoring.bench.agreement import agreement
from diffalign.scoring.bench.preferences import Pair
from diffalign.scoring.bench.protocols import half_point_accuracy, inversion_accuracy
from diffalign.scoring.bench.ties import TieCalibration


def acc_eq(labels, differences, weights, epsilon):
    """The definition, pair by pair."""
    right = 0
    for label, difference, weight in zip(labels, differences, weights, strict=True):
        predicted = 0 if abs(difference) <= epsilon else 1 if difference > 0 else -1
        right += weight * (predicted == label)
    return right / sum(weights)


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_best_threshold_is_that_of_trying_all(levels):
    draw = np.random.default_rng(0)
    for _ in range(150):
        count = int(draw.integers(1, 14))
        labels = draw.integers(-1, 2, count)
        differences = draw.integers(-levels, levels + 1, count) / 7  # few levels: equal |d|, and zeros
        weights = draw.integers(0, 3, count)
        weights[0] += 1
        tried = {eps: acc_eq(labels, differences, weights, eps) for eps in sorted({0.0, *np.abs(differences)})}
        best = max(tried.values())
        accuracy, epsilon = TieCalibration(labels, differences).best(weights)
        assert accuracy == pytest.approx(best, abs=1e-12)
        assert epsilon == min(eps for eps, value in tried.items() if value > best - 1e-12)


def test_weights_are_copies():
    labels, differences, weights = np.array([1, 0, -1, 0]), np.array([0.5, 0.1, 0.3, -0.7]), np.array([3, 2, 0, 1])
    copies = TieCalibration(labels.repeat(weights), differences.repeat(weights))
    assert TieCalibration(labels, differences).best(weights) == copies.best()
    assert all(map(math.isnan, TieCalibration([], []).best()))


def pairs_of(labels, prompts):
    """Pair i compares items 2i and 2i + 1."""
    return [Pair(2 * i, 2 * i + 1, int(x), str(p), i) for i, (x, p) in enumerate(zip(labels, prompts, strict=True))]


def scores_of(differences):
    return [score for difference in differences for score in (difference, 0.0)]


def test_what_is_counted_and_what_is_left_out():
    pairs = pairs_of([1, -1, 1, 0, 1], "aabbb")
    scores = scores_of([2.0, 1.0, 0.0, 0.5, 3.0])
    scores[9] = None
    found = agreement(pairs, scores, resamples=50)
    assert (found.pairs, found.ties, found.left_out, found.prompts) == (4, 1, 1, 2)
    assert found.accuracy == pytest.approx(1 / 3)  # right, wrong, equal scores
    assert (found.with_ties, found.epsilon) == (pytest.approx(2 / 4), 0.5)
    nothing = agreement(pairs, [None] * 10)
    assert (nothing.pairs, nothing.left_out) == (0, 5)
    assert math.isnan(nothing.accuracy)
    assert math.isnan(nothing.with_ties)
    assert math.isnan(nothing.low)


def test_without_tied_labels_both_accuracies_are_the_same():
    draw = np.random.default_rng(1)
    found = agreement(pairs_of(draw.choice([-1, 1], 60), range(60)), scores_of(draw.normal(size=60)), resamples=100)
    assert (found.with_ties, found.epsilon) == (pytest.approx(found.accuracy), 0.0)


def test_the_interval_is_over_prompts():
    """400 prompts, each with three copies of one pair: the spread is that of 400 draws, not of 1,200."""
    labels = np.repeat(np.where(np.arange(400) < 280, 1, -1), 3)
    found = agreement(pairs_of(labels, np.repeat(np.arange(400), 3)), scores_of(np.ones(1200)))
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert found.accuracy == pytest.approx(0.7)
    assert found.low == pytest.approx(0.7 - half, abs=0.006)
    assert found.high == pytest.approx(0.7 + half, abs=0.006)
    same = agreement(pairs_of([1, -1] * 5, np.repeat(range(5), 2)), scores_of(np.ones(10)))
    assert (same.low, same.high) == (0.5, 0.5)  # each prompt has one right and one wrong


def test_inversions_are_averaged_over_rankings():
    labels, records = [1, 1, 0, 1], [0, 0, 0, 7]
    assert inversion_accuracy(labels, [1.0, -1.0, -9.0, -1.0], records) == pytest.approx((2 / 3 + 0) / 2)
    assert inversion_accuracy([1, -1], [0.0, -1.0], [0, 0]) == pytest.approx(0.75)  # equal scores: half


def test_half_points_at_the_threshold_of_the_validation_split():
    """|tanh(d / 2)| is 0.25 and 0.55."""
    tie, sure = 2 * math.atanh(0.25), 2 * math.atanh(0.55)
    labels, differences = [0, 0, 0, 1, 1, -1], [tie, tie, sure, tie, sure, sure]
    # Threshold 0: a label tie has half a point.
    assert half_point_accuracy(labels, differences, [1], [tie]) == pytest.approx((1.5 + 1 + 1 + 0) / 6)
    # 0.3 is the first at which the tie of the validation split is predicted.
    assert half_point_accuracy(labels, differences, [0, 1], [tie, sure]) == pytest.approx((2.5 + 0.5 + 1 + 0) / 6)
