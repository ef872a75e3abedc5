"""The Frechet distance against closed forms and a matrix root; statistics that merge, and survive a file."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from diffalign.rewards.sets import FeatureStatistics, FrechetReward, frechet_distance


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 100) -> FeatureStatistics:
    return FeatureStatistics(count, mean, covariance * (count - 1))


def random(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + seed


def by_matrix_root(x: torch.Tensor, y: torch.Tensor) -> float:
    """The published formula in NumPy and SciPy."""
    first, second = (np.cov(side.numpy(), rowvar=False) for side in (x, y))
    offset = x.numpy().mean(axis=0) - y.numpy().mean(axis=0)
    return float(offset @ offset + np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real))


def test_commuting_gaussians():
    """|m1 - m2|^2 + sum_k (s1_k - s2_k)^2 where both covariances have the same axes."""
    axes = torch.linalg.qr(random(5, 5, 2)).Q
    first, second = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.0]), torch.tensor([1.5, 1.0, 0.5, 2.5, 0.0])
    means = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = [
        gaussian(mean, axes @ torch.diag(scale.double().square()) @ axes.T)
        for mean, scale in zip(means, (first, second), strict=True)
    ]
    expected = (means[0] - means[1]).square().sum() + (first - second).square().sum()
    assert math.isclose(frechet_distance(*statistics), expected, rel_tol=1e-12)


def test_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    x, y = random(9, 1, 1), random(12, 1, 4)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert math.isclose(-FrechetReward(y).value(x), expected, rel_tol=1e-12)
    assert math.isclose(frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)), expected, rel_tol=1e-12)


@pytest.mark.parametrize("count", [60, 6], ids=["full rank", "fewer samples than dimensions"])
def test_two_sets_against_the_matrix_root(count):
    x, y = random(count, 8, 1), random(40, 8, 2)
    expected = by_matrix_root(x, y)
    assert math.isclose(-FrechetReward(y).value(x), expected, rel_tol=1e-7)  # the root of a singular matrix is rough
    assert math.isclose(frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)), expected, rel_tol=1e-7)
    assert math.isclose(frechet_distance(FeatureStatistics.of(y), FeatureStatistics.of(x)), expected, rel_tol=1e-7)


@pytest.mark.parametrize(("samples", "exemplars"), [(60, 40), (6, 40), (40, 5), (5, 6)])
def test_two_sets_against_the_nuclear_norm_of_both(samples, exemplars):
    """tr (S1 S2)^(1/2) = |X Y^T|_* of the centred features over both divisors: no root and no eigenvalue of either."""
    x, y = random(samples, 8, 1), random(exemplars, 8, 2)
    a, b = ((side - side.mean(dim=0)) / math.sqrt(len(side) - 1) for side in (x, y))
    root = np.linalg.svd((a @ b.T).numpy(), compute_uv=False).sum()
    expected = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    assert math.isclose(-FrechetReward(y).value(x), expected, rel_tol=1e-13)
    statistics = FeatureStatistics.of(x), FeatureStatistics.of(y)
    assert math.isclose(frechet_distance(*statistics), expected, rel_tol=1e-13)


@pytest.mark.parametrize("count", [30, 5])
def test_equal_sets_are_at_distance_zero(count):
    x = random(count, 8, 3)
    scale = FeatureStatistics.of(x).covariance.trace()
    assert abs(FrechetReward(x).value(x)) < 1e-12 * scale
    assert abs(FrechetReward(x).value(x.flip(0))) < 1e-12 * scale


def test_a_reference_without_spread():
    """Identical exemplars, and a single one: |m - m_r|^2 + tr S."""
    x = random(7, 4, 1)
    expected = x.mean(dim=0).square().sum() + x.var(dim=0).sum()
    for reference in (torch.zeros(3, 4), FeatureStatistics.of(torch.zeros(1, 4))):
        reward = FrechetReward(reference)
        assert math.isclose(-reward.value(x), expected, rel_tol=1e-12)
        assert torch.allclose(reward.credit(x), super(FrechetReward, reward).credit(x), atol=1e-9)


def test_streams_merge_to_the_statistics_of_all():
    x = random(50, 6, 1) + 1e3  # far from the origin, where sums of squares would lose half the digits
    whole = FeatureStatistics.of(x)
    parts = [FeatureStatistics.of(part) for part in x.split([1, 20, 3, 26])]
    for order in (parts, parts[::-1]):
        merged = sum(order[1:], start=order[0])
        assert merged.count == 50
        assert torch.allclose(merged.mean, whole.mean, rtol=1e-14)
        assert torch.allclose(merged.covariance, torch.cov(x.T), rtol=1e-10)
    reference = random(30, 6, 2)
    assert math.isclose(FrechetReward(merged).value(reference), FrechetReward(x).value(reference), rel_tol=1e-12)


def test_statistics_survive_a_file(tmp_path):
    path = tmp_path / "reference.safetensors"
    whole = FeatureStatistics.of(random(20, 5, 1).float())
    whole.save(path)
    read = FeatureStatistics.load(path)
    assert read.count == 20
    assert torch.equal(read.mean, whole.mean)
    assert torch.equal(read.scatter, whole.scatter)
    x = random(8, 5, 2)
    assert torch.equal(FrechetReward(read).value(x), FrechetReward(whole).value(x))


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    other, text = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    save_file({"mean": torch.zeros(3)}, other)
    text.write_text("mean")
    for path in (other, text):
        with pytest.raises(ValueError, match="no feature statistics"):
            FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        FeatureStatistics.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot be merged"):
        FeatureStatistics.of(torch.zeros(2, 3)) + FeatureStatistics.of(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not all finite"):
        FeatureStatistics.of(torch.full((2, 3), math.inf))


def test_a_factor_first_used_in_inference_mode_serves_gradients():
    x = random(6, 4, 1).requires_grad_()
    reward = FrechetReward(random(9, 4, 2))
    with torch.inference_mode():
        value = reward(x).value
    score = reward(x)
    score.value.backward()
    assert math.isclose(score.value.detach(), value, rel_tol=1e-12)
    assert x.grad.isfinite().all()
