"""The estimator of best-of-n against all subsets, one by one."""

from itertools import combinations

import numpy as np
import pytest

from tests.benchmarks.best_of_n import best_of_n, kl


@pytest.mark.parametrize("proxy", [[0.3, -1.0, 2.0, 0.7, 5.0, 0.1], [1.0, 1.0, 2.0, 0.0, 2.0, 1.0]])
def test_it_is_the_mean_over_all_subsets(proxy):
    proxy, gold = np.array(proxy), np.random.default_rng(0).random((6, 2))
    for n, found in zip(range(1, 7), best_of_n(proxy, gold, range(1, 7)), strict=True):
        best = []
        for subset in combinations(range(6), n):
            top = [i for i in subset if proxy[i] == proxy[list(subset)].max()]
            best.append(gold[top].mean(0))
        np.testing.assert_allclose(found, np.mean(best, axis=0), atol=1e-12)


def test_large_counts_do_not_overflow():
    proxy = np.random.default_rng(1).normal(size=1000)
    one, ten, most = best_of_n(proxy, proxy, [1, 10, 1000])
    assert one == pytest.approx(proxy.mean())
    assert ten == pytest.approx(1.54, abs=0.1)  # the expected largest of ten normal numbers
    assert most == pytest.approx(proxy.max())


def test_divergence_of_one_sample_is_zero_and_grows():
    assert kl([1, 2, 1000]) == pytest.approx([0, np.log(2) - 0.5, np.log(1000) - 0.999])
