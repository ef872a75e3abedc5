"""Intervals against closed forms and scipy; diversity against the sum over pairs."""

import math

import numpy as np
import pytest
from scipy import stats

from diffalign.report.statistics import bootstrap_interval, compare, diversity, wilson_interval


def test_bootstrap_agrees_with_the_t_interval():
    values = np.random.default_rng(0).normal(0.3, 2.0, 400)
    low, high = bootstrap_interval(values)
    truth = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    np.testing.assert_allclose((low, high), truth, atol=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_bootstrap_covers_as_often_as_it_says():
    draws = np.random.default_rng(1).exponential(1.0, (300, 60))
    covered = [low <= 1 <= high for low, high in (bootstrap_interval(row, resamples=600) for row in draws)]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_large_sets_are_resampled_in_chunks():
    values = np.random.default_rng(2).normal(size=300_000)
    low, high = bootstrap_interval(values, resamples=40)
    assert low < values.mean() < high
    assert high - low < 8 / math.sqrt(300_000)


def test_pairs_of_one_prompt_count_once():
    """Copies of every sample must not shrink the interval."""
    generator = np.random.default_rng(3)
    base, gain = generator.normal(size=50), generator.normal(0.5, 1, 50)
    once = compare("r", "training", base, base + gain, list(range(50)))
    copies = compare("r", "training", np.repeat(base, 8), np.repeat(base + gain, 8), list(np.repeat(np.arange(50), 8)))
    assert copies == once
    assert once.n == 50
    np.testing.assert_allclose(once.difference, gain.mean())
    np.testing.assert_allclose(once.tuned - once.base, once.difference)


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(4)
    base = generator.normal(0, 100, 64)
    figure = compare("r", "heldout", base, base + 1 + generator.normal(0, 0.1, 64), list(range(64)))
    assert 0.9 < figure.low < 1 < figure.high < 1.1


def test_failed_scores_leave_with_their_pair():
    figure = compare("r", "oracle", [1, np.nan, 3, 5], [2, 9, np.nan, 7], ["a", "a", "b", "c"], unit="%")
    assert (figure.n, figure.base, figure.tuned, figure.difference) == (2, 3.0, 4.5, 1.5)
    alone = compare("r", "oracle", [1.0], [2.0], [0])
    assert math.isnan(alone.low)
    assert math.isnan(compare("r", "oracle", [np.nan], [2.0], [0]).base)
    with pytest.raises(ValueError, match="paired"):
        compare("r", "oracle", [1.0], [2.0, 3.0], [0])


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 17), (412, 512)])
def test_wilson_equals_scipy(successes, n):
    truth = stats.binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, n), (truth.low, truth.high), rtol=1e-9, atol=1e-12)


def test_wilson_at_its_borders():
    assert all(math.isnan(x) for x in wilson_interval(0, 0))
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson_interval(5, 4)


def test_diversity_is_the_mean_over_pairs():
    features = np.random.default_rng(5).normal(size=(9, 4)) * np.arange(1, 10)[:, None]
    ids = ["a", "b", "a", "a", "b", "c", "a", "b", "d"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def pairs(rows):
        return np.mean([1 - unit[i] @ unit[j] for i in rows for j in rows if i < j])

    result = diversity(features, ids)
    np.testing.assert_allclose(result.overall, pairs(range(9)))
    np.testing.assert_allclose([result.of_prompt["a"], result.of_prompt["b"]], [pairs([0, 2, 3, 6]), pairs([1, 4, 7])])
    np.testing.assert_allclose(result.within, (result.of_prompt["a"] + result.of_prompt["b"]) / 2)
    assert set(result.of_prompt) == {"a", "b"}


def test_diversity_without_pairs():
    result = diversity(np.eye(3), [0, 1, 2])
    assert math.isnan(result.within)
    assert result.overall == 1.0
    assert math.isnan(diversity(np.eye(1), [0]).overall)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        diversity(np.eye(3), [0])
