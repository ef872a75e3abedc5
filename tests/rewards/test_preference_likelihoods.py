"""Likelihoods of choices against their definitions: sums, numerical integrals and finite differences in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from diffalign.rewards.preference import bradley_terry, gaussian, rao_kupper

MARGINS = torch.tensor([-30.0, -3.0, -0.4, 0.0, 0.7, 5.0, 40.0], dtype=torch.float64)
FIRST, SECOND, TIE = torch.ones(7), -torch.ones(7), torch.zeros(7)


def test_bradley_terry_is_a_coin_of_the_difference():
    first, second = bradley_terry(MARGINS, FIRST), bradley_terry(MARGINS, SECOND)
    torch.testing.assert_close(first.exp() + second.exp(), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(first - second, MARGINS)  # log odds


@pytest.mark.parametrize("threshold", [0.01, 0.5, math.log(5)])
def test_rao_kupper_probabilities_sum_to_one(threshold):
    eta = torch.tensor(threshold, dtype=torch.float64)
    parts = [rao_kupper(MARGINS, outcome, eta) for outcome in (FIRST, SECOND, TIE)]
    torch.testing.assert_close(sum(part.exp() for part in parts), torch.ones(7, dtype=torch.float64))
    # theta = exp(eta): pi_1 / (pi_1 + theta pi_2) is the probability of the first
    strengths = MARGINS.exp()
    torch.testing.assert_close(parts[0].exp(), strengths / (strengths + eta.exp()))
    # two equal samples tie with probability (theta - 1) / (theta + 1)
    assert parts[2].exp()[3] == pytest.approx((eta.exp() - 1) / (eta.exp() + 1))


def test_rao_kupper_without_a_threshold_is_bradley_terry():
    eta = torch.tensor(1e-9, dtype=torch.float64)
    torch.testing.assert_close(rao_kupper(MARGINS, FIRST, eta), bradley_terry(MARGINS, FIRST))
    assert rao_kupper(MARGINS, TIE, eta).max() < -19


@pytest.mark.parametrize("mean", [-6.0, -0.5, 0.0, 2.0, 9.0])
@pytest.mark.parametrize("variance", [1e-4, 0.3, 4.0, 40.0])
def test_the_gaussian_likelihood_is_the_integral(mean, variance):
    std = variance**0.5
    expected, _ = quad(
        lambda z: expit(z) * norm.pdf(z, mean, std), mean - 9 * std, mean + 9 * std, points=[mean, 0], epsabs=1e-12
    )
    arguments = (torch.tensor([mean], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))
    found = gaussian(*arguments, torch.ones(1)).exp()
    assert found.item() == pytest.approx(expected, abs=1e-8)
    other = gaussian(*arguments, -torch.ones(1)).exp()
    assert found.item() + other.item() == pytest.approx(1, abs=1e-12)


def test_the_gaussian_likelihood_without_variance_is_bradley_terry():
    tiny = torch.full((7,), 1e-12, dtype=torch.float64)
    torch.testing.assert_close(gaussian(MARGINS, tiny, FIRST), bradley_terry(MARGINS, FIRST), atol=1e-6, rtol=1e-6)


def test_uncertainty_pays_where_the_label_contradicts_the_means():
    margin, outcome = torch.full((2,), 3.0), torch.tensor([1.0, -1.0])
    sure, unsure = gaussian(margin, torch.full((2,), 0.1), outcome), gaussian(margin, torch.full((2,), 9.0), outcome)
    assert unsure[1] > sure[1]
    assert unsure[0] < sure[0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda d, s: bradley_terry(d, torch.tensor([1.0, -1.0])),
        lambda d, s: rao_kupper(d, torch.tensor([1.0, -1.0]), s[0]),
        lambda d, s: rao_kupper(d, torch.tensor([0.0, 0.0]), s[0]),
        lambda d, s: gaussian(d, s, torch.tensor([1.0, -1.0])),
    ],
    ids=["bradley-terry", "decided", "ties", "gaussian"],
)
def test_gradients_equal_finite_differences(loss):
    point = np.array([0.8, -1.7, 0.6, 2.5])

    def value(x):
        tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        return loss(tensor[:2], tensor[2:]).sum(), tensor

    total, leaf = value(point)
    total.backward()
    for i, step in enumerate(1e-6 * np.eye(4)):
        slope = (value(point + step)[0] - value(point - step)[0]).item() / 2e-6
        assert leaf.grad[i].item() == pytest.approx(slope, abs=1e-8), i
