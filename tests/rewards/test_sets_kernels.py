"""KID, CMMD and Vendi against sums written out, and against closed forms."""

import math

import numpy as np
import pytest
import torch

from diffalign.rewards.sets import CMMDReward, KIDReward, VendiReward, kid_of_subsets, mmd


def random(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1 * seed


def cubic(a: np.ndarray, b: np.ndarray) -> float:
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def gaussian(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.exp(-float(np.sum((a - b) ** 2)) / (2 * 10**2))


def test_kid_is_the_unbiased_estimate_pair_by_pair():
    x, y = random(6, 5, 0).numpy(), random(9, 5, 1).numpy()
    within = sum(cubic(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (6 * 5)
    reference = sum(cubic(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
    between = sum(cubic(a, b) for a in x for b in y) / (6 * 9)
    value = KIDReward(torch.from_numpy(y)).value(torch.from_numpy(x))
    assert math.isclose(-value, within + reference - 2 * between, rel_tol=1e-12)


def test_kid_of_a_linear_statistic_in_one_dimension():
    """k(x, y) = (xy + 1)^3 = sum_p binom(3, p) x^p y^p, so MMD^2 weighs the differences of the first three moments."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    # pairs of x: (0, 1) twice, k = 1; of y: k(2, 2) = 125; across: k(0, 2) = 1, k(1, 2) = 27
    assert KIDReward(y)(torch.cat([x, x])).value.dtype == torch.float64
    assert KIDReward(y).value(x.double()).item() == -(1 + 125 - 2 * 14)


def test_kid_is_unbiased():
    """Two halves of one distribution: the mean over draws is zero within its error, though each value is not."""
    draws = torch.stack(
        [KIDReward(random(8, 3, 2 * s) - 0.2 * s).value(random(8, 3, 2 * s + 1) - 0.2 * s - 0.1) for s in range(100)]
    )
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(100)
    assert draws.std() > 0.1


def test_kid_of_subsets_has_the_mean_of_all_pairs():
    x, y = random(12, 4, 0), random(12, 4, 1)
    mean, deviation = kid_of_subsets(x, y, subsets=3, size=12)
    assert math.isclose(mean, -KIDReward(y).value(x), rel_tol=1e-10)  # subsets of everything
    assert deviation < 1e-12
    mean, deviation = kid_of_subsets(x, y, subsets=100, size=6)
    assert abs(mean + KIDReward(y).value(x).item()) < 4 * deviation / math.sqrt(100)
    assert kid_of_subsets(x, y, subsets=5, size=6) == kid_of_subsets(x, y, subsets=5, size=6)
    with pytest.raises(ValueError, match="subsets of 13"):
        kid_of_subsets(x, y, size=13)


def test_cmmd_is_the_biased_estimate_pair_by_pair():
    x, y = random(6, 5, 0).numpy(), random(9, 5, 1).numpy()
    within = sum(gaussian(a, b) for a in x for b in x) / 36
    reference = sum(gaussian(a, b) for a in y for b in y) / 81
    between = sum(gaussian(a, b) for a in x for b in y) / 54
    value = CMMDReward(torch.from_numpy(y)).value(torch.from_numpy(x))
    assert math.isclose(-value, 1000 * (within + reference - 2 * between), rel_tol=1e-9)


def test_cmmd_in_closed_form():
    """Two sets of one point each at right angles: 1000 (2 - 2 exp(-2 / 200)); lengths do not matter; equal sets: 0."""
    x, y = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64), torch.tensor([[0.0, 7.0]] * 2, dtype=torch.float64)
    assert math.isclose(-CMMDReward(y).value(x), 2000 * (1 - math.exp(-0.01)), rel_tol=1e-11)
    assert abs(CMMDReward(x).value(5 * x)) < 1e-11


@pytest.mark.parametrize("reward", [KIDReward, CMMDReward])
def test_blocks_change_nothing(reward, monkeypatch):
    x, y = random(11, 4, 0).requires_grad_(), random(13, 4, 1)
    found = []
    for block in (2048, 3):
        monkeypatch.setattr(mmd, "_BLOCK", block)
        value = reward(y).value(x)
        found.append((value.detach(), torch.autograd.grad(value, x)[0], reward(y).credit(x.detach())))
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-11, atol=1e-12)


def test_vendi_counts_what_differs():
    """n at right angles: n; all alike: 1; a and b samples of two kinds: exp of the entropy of their shares."""
    axes = torch.eye(5, dtype=torch.float64)
    vendi = VendiReward()
    assert math.isclose(vendi.value(axes), 5, rel_tol=1e-12)
    assert math.isclose(vendi.value(axes[:1].expand(4, 5)), 1, rel_tol=1e-12)
    shares = np.array([3, 1]) / 4
    assert math.isclose(vendi.value(2 * axes[[0, 0, 0, 1]]), math.exp(-(shares * np.log(shares)).sum()), rel_tol=1e-12)
    # two unit vectors of cosine c: eigenvalues (1 + c) / 2 and (1 - c) / 2
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    assert math.isclose(vendi.value(pair), math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), rel_tol=1e-12)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_vendi_against_the_gram_matrix(shape):
    x = random(*shape, 1)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / len(unit)).clip(min=1e-300)
    assert math.isclose(VendiReward().value(x), math.exp(-(shares * np.log(shares)).sum()), rel_tol=1e-10)


def test_vendi_has_a_gradient_at_repeated_samples():
    """Zero by symmetry for all alike: every direction is as good; finite, where a log of the eigenvalues is not."""
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    VendiReward()(x).value.backward()
    assert x.grad.isfinite().all()
