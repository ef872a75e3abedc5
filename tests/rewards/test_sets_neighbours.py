"""Precision, recall, density and coverage against loops over the points, and on a line, by hand."""

import numpy as np
import pytest
import torch

from diffalign.rewards.sets import (
    CoverageReward,
    DensityReward,
    PrecisionReward,
    RecallReward,
    SetReward,
    neighbours,
)

REWARDS = (PrecisionReward, RecallReward, DensityReward, CoverageReward)


def line(*points: float) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64)[:, None]


def random(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(samples: np.ndarray, exemplars: np.ndarray, k: int) -> dict[type, float]:
    """The definitions, point by point."""

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(point, points, i):
        return np.linalg.norm(point - points[i]) <= radius(points, i)

    balls = range(len(exemplars))
    return {
        PrecisionReward: np.mean([any(inside(x, exemplars, i) for i in balls) for x in samples]),
        RecallReward: np.mean([any(inside(y, samples, j) for j in range(len(samples))) for y in exemplars]),
        DensityReward: np.mean([sum(inside(x, exemplars, i) for i in balls) for x in samples]) / k,
        CoverageReward: np.mean([any(inside(x, exemplars, i) for x in samples) for i in balls]),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_every_value_equals_its_definition(k):
    samples, exemplars = random(12, 0) + 1.5, random(15, 1)
    expected = written_out(samples.numpy(), exemplars.numpy(), k)
    for reward in REWARDS:
        assert reward(exemplars, k=k).value(samples).item() == pytest.approx(expected[reward], abs=1e-15)
    assert all(0 < value < 1 for key, value in expected.items() if key is not DensityReward)


def test_on_a_line_by_hand():
    """Exemplars 0, 1, 2, 10: radii 1, 1, 1, 8. Samples 1.5, 9, 30, 31: radii 7.5, 7.5, 1, 1; k = 1."""
    exemplars, samples = line(0, 1, 2, 10), line(1.5, 9, 30, 31)
    score = PrecisionReward(exemplars, k=1)(samples)
    assert score.value == 0.5  # 1.5 is by 1 and 2, 9 by 10
    assert torch.allclose(score.credit, torch.tensor([1 / 6, 1 / 6, -1 / 6, -1 / 6], dtype=torch.float64))
    assert DensityReward(exemplars, k=1)(samples).value == 3 / 4
    coverage = CoverageReward(exemplars, k=1)(samples)
    assert coverage.value == 3 / 4  # all but 0
    assert coverage.credit.tolist() == [0.5, 0.25, 0, 0]
    recall = RecallReward(exemplars, k=1)(samples)
    assert recall.value == 1  # 1.5 and 9 reach all four
    # without 1.5, 9 reaches to 30, by 21, and covers all; without 9, 1.5 reaches to 30 likewise
    assert recall.credit.tolist() == [0, 0, 0, 0]


def test_recall_counts_balls_that_grow():
    """Samples 0, 1, 5, 100 and k = 1: without 1, the ball of 0 grows from 1 to 5 and takes in an exemplar at -4."""
    reward = RecallReward(line(-4, 1000), k=1)
    samples = line(0, 1, 5, 100)
    assert reward.value(samples) == 0
    assert reward.credit(samples).tolist() == SetReward.credit(reward, samples).tolist() == [0, -0.5, 0, 0]


def test_equal_sets_are_precise_and_complete():
    """A ball's boundary counts: with k = 1 and repeated points every radius is zero, and still all are inside."""
    points = random(6, 0).repeat(2, 1)
    for reward in (PrecisionReward, RecallReward, CoverageReward):
        assert reward(points, k=1).value(points) == 1
    assert DensityReward(random(40, 3), k=5).value(random(40, 3)) > 1


def test_blocks_change_nothing(monkeypatch):
    points = random(17, 2)
    whole = neighbours.radii(points, 3)
    monkeypatch.setattr(neighbours, "_BLOCK", 5 * 17)
    assert torch.equal(neighbours.radii(points, 3), whole)
    assert torch.equal(neighbours.radii(points[:4], 3)[:, 1], torch.full((4,), torch.inf, dtype=torch.float64))
