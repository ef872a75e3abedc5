"""The arithmetic behind a search's report: the best of n from one pool, the best so far, and where nodes stand."""

from itertools import combinations

import numpy as np
import pytest

from diffalign.report.search_charts import (
    anytime,
    best_of_n_curve,
    best_path,
    depths,
    largest_branches,
    leaf_order,
    so_far,
    tree,
)
from diffalign.report.statistics import expected_best


def test_the_best_of_n_is_the_mean_over_all_subsets():
    values = np.array([0.3, -1.0, 2.5, 0.3, 1.0, -4.0, 7.0])
    told = expected_best(values, range(1, 8))
    counted = [np.mean([max(some) for some in combinations(values, n)]) for n in range(1, 8)]
    np.testing.assert_allclose(told, counted, rtol=1e-12)


def test_the_best_of_n_of_a_large_pool_of_uniform_numbers():
    values = (np.arange(5000) + 0.5) / 5000
    n = np.array([1, 10, 100, 1000])
    np.testing.assert_allclose(expected_best(values, n), n / (n + 1), atol=2e-4)


@pytest.mark.parametrize("count", [0, 4])
def test_more_than_there_are_cannot_be_drawn(count):
    with pytest.raises(ValueError, match="must lie between 1 and 3"):
        expected_best([1.0, 2.0, 3.0], [count])


TRACE = {
    "rewards": np.array([1.0, 3.0, 2.0, 5.0]),
    "nfe": np.array([10, 10, 20, 30]),
    "reward_calls": np.array([2, 2, 3, 4]),
    "seconds": np.array([0.5, 0.5, 1.0, 1.5]),
}


def test_the_best_so_far_at_a_cost():
    assert so_far(TRACE, "nfe", [10, 15, 20, 29.9, 30, 99]).tolist() == [3, 3, 3, 3, 5, 5]


def test_a_sample_of_the_pool_costs_what_the_pool_cost_failures_included():
    pools = [
        {"pool/rewards": np.array([1.0, 2.0]), "pool/cost": np.array([40.0, 4.0, 1.0])},
        {"pool/rewards": np.array([5.0, 3.0, 4.0]), "pool/cost": np.array([60.0, 3.0, 1.5])},
    ]
    cost, best = best_of_n_curve(pools, "reward_calls")
    assert cost.tolist() == [1.5, 3.0]  # of a result: 4 / 2 and 3 / 3 calls
    np.testing.assert_allclose(best, [(1.5 + 4) / 2, (2 + (5 + 5 + 4) / 3) / 2])


def test_charts_are_drawn_where_there_is_something_to_draw():
    pool = {"pool/rewards": np.array([1.0, 2.0]), "pool/cost": np.array([40.0, 4.0, 1.0])}
    charts = anytime([TRACE | pool, TRACE | pool], "tree_search")
    assert [chart.key for chart in charts] == ["nfe", "reward_calls", "seconds"]
    assert "tree_search" in charts[0].svg
    assert "best of n" in charts[0].svg
    assert "best of n" not in anytime([TRACE | pool, TRACE], "tree_search")[0].svg  # not of all prompts
    assert anytime([{name: values[:0] for name, values in TRACE.items()}], "tree_search") == []


#       0
#     1   2        3
#    4 5   6      (no child)
#          7, 8
PARENT = np.array([-1, 0, 0, 0, 1, 1, 2, 6, 6])


def test_where_nodes_stand():
    assert depths(PARENT).tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    x = leaf_order(PARENT, depths(PARENT))
    assert x[[4, 5, 7, 8, 3]].tolist() == [0, 1, 2, 3, 4]
    assert x[[1, 6, 2]].tolist() == [0.5, 2.5, 2.5]
    assert x[0] == pytest.approx((0.5 + 2.5 + 4) / 3)
    value = np.array([1.0, 2, 3, 9, 4, 5, 6, 7, np.nan])
    assert best_path(PARENT, depths(PARENT), value) == [0, 2, 6, 7]


def test_the_most_visited_branches_are_drawn():
    visits = np.array([9, 3, 5, 1, 1, 1, 4, 2, 1])
    assert largest_branches(PARENT, visits, 5).tolist() == [0, 2, 6, 7, 8]
    assert largest_branches(PARENT, visits, 8).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert largest_branches(PARENT, visits, 2).tolist() == [0, 2, 6, 7, 8]  # one at least
    values = {
        "tree/parent": PARENT,
        "tree/visits": visits,
        "tree/value": np.arange(9.0),
        "tree/marks": np.array([0, 4, 8]),
    }
    chart = tree(values, "a <red> circle")
    assert chart is not None
    assert chart.key == "9 nodes"
    assert all(words in chart.svg for words in ("noise", "step 4", "image", "a &lt;red&gt; circle"))
    assert tree({}, "none") is None
