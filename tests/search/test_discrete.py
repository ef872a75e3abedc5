"""Searches over categorical steps, held to the enumerated target."""

import math

import numpy as np
import pytest
import torch

from diffalign.search.best_of_n import BestOfN, Importance
from diffalign.search.budget import Budget
from diffalign.search.tree_sampling import TreeSampling
from diffalign.search.tree_search import TreeSearch
from tests.search.discrete import CLEAN, Enumerable


@pytest.fixture(scope="module")
def space():
    return Enumerable(seeds=range(20))


def test_the_recursion_and_the_matrices_agree(space):
    start = space.initial(torch.tensor([0]), [(0,)])
    assert float(space.soft_value(start)) == pytest.approx(space.log_z)
    assert float(space.prior[CLEAN].sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "search",
    [Importance(), TreeSampling(), TreeSampling(select_lambda=0), TreeSampling(select_by="rollouts")],
    ids=["importance", "tree", "even tree", "paper"],
)
def test_samples_tend_to_the_target(space, search):
    """Ten times the budget, a third of the distance, as independent samples have it; less where selection adapts."""
    few, many = (
        np.mean([space.total_variation(each.results, each.log_weights) for each in search.run(space, Budget(nfe=nfe))])
        for nfe in (200, 2000)
    )
    adaptive = getattr(search.config, "select_by", "") == "rollouts"
    assert many < few * (0.6 if adaptive else 0.45)
    assert many < (0.2 if adaptive else 0.14)


def test_the_even_tree_estimates_z_without_bias(space):
    z = np.exp([each.log_z - space.log_z for each in TreeSampling().run(space, Budget(nfe=600))])
    assert abs(z.mean() - 1) < 3.5 * z.std() / math.sqrt(len(z))


def test_a_maximiser_finds_the_best_sequence(space):
    """Of 64 sequences, at 600 evaluations."""
    best = float(space.table[CLEAN].max())
    for search in (BestOfN(), TreeSearch()):
        assert np.mean([each.reward == best for each in search.run(space, Budget(nfe=600))]) > 0.7


def test_micro_batches_change_nothing():
    found = [TreeSampling().run(Enumerable(micro_batch_size=size), Budget(nfe=300))[0].results for size in (1, 7, 64)]
    assert all(torch.equal(found[0], each) for each in found)
