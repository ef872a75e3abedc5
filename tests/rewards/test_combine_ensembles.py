"""Ensembles: the limits between mean and minimum, the paper's variance, and weights by the members' own sigma."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffalign.rewards import Reward, Score
from diffalign.rewards.ensembles import InverseVariance, Mean, SoftMin, UncertaintyWeighted, WorstCase, mean, minimum
from tests.rewards.channels import A, B, channel, pixels, prompts, table


def three():
    return [channel(0), channel(1), channel(2)]


def score(reward, count=7):
    return reward(pixels(count), prompts(count)).value


def test_the_functions_are_the_classes():
    assert isinstance(minimum(*three()), WorstCase)
    assert isinstance(mean(*three()), Mean)


def test_soft_minimum_goes_from_the_minimum_to_the_mean():
    low, middle = score(WorstCase(three())), score(Mean(three()))
    torch.testing.assert_close(score(SoftMin(three(), 1e-4)), low, rtol=0, atol=1e-4 * math.log(3))
    torch.testing.assert_close(score(SoftMin(three(), 1e5)), middle, rtol=0, atol=1e-5)
    ladder = [low, *(score(SoftMin(three(), beta)) for beta in (0.01, 0.1, 1.0, 10.0)), middle]
    for below, above in itertools.pairwise(ladder):
        assert (below < above).all()


def test_soft_minimum_is_uwo_to_second_order():
    """The remainder falls with 1 / beta^2: a hundredth for ten times the temperature."""
    error = [
        (score(SoftMin(three(), beta)) - score(UncertaintyWeighted(three(), 1 / (2 * beta)))).abs().max().item()
        for beta in (10.0, 100.0)
    ]
    assert error[1] == pytest.approx(error[0] / 100, rel=0.05)


def test_soft_minimum_does_not_overflow():
    far = [channel(0, scale=3e4, shift=-1e4), channel(1, scale=3e4, shift=-1e4)]
    x = pixels(5, dtype=torch.float32).requires_grad_()
    value = SoftMin(far, 0.5)(x, prompts(5)).value
    torch.testing.assert_close(value, WorstCase(far)(x, prompts(5)).value, rtol=1e-6, atol=0.5)
    value.sum().backward()
    assert x.grad.isfinite().all()


def test_gradient_of_the_soft_minimum_is_a_softmax():
    x = pixels(4).requires_grad_()
    SoftMin(three(), 0.2)(x, prompts(4)).value.sum().backward()
    torch.testing.assert_close(x.grad[:, :, 0, 0], torch.softmax(-x.detach()[:, :, 0, 0] / 0.2, dim=1))


def test_members_that_tie_for_the_worst_share_its_gradient():
    x = torch.full((1, 3, 1, 1), 0.5).requires_grad_()
    minimum(channel(0), channel(1))(x, prompts(1)).value.sum().backward()
    assert x.grad.flatten().tolist() == [0.5, 0.5, 0.0]


def test_the_variance_is_that_of_the_population():
    r = table(pixels(7)).numpy()
    np.testing.assert_allclose(score(UncertaintyWeighted(three(), 0.5)), r.mean(0) - 0.5 * r.var(0, ddof=0), rtol=1e-12)
    sample = UncertaintyWeighted(three(), 0.5 * 3 / 2)  # K / (K - 1)
    np.testing.assert_allclose(score(sample), r.mean(0) - 0.5 * r.var(0, ddof=1), rtol=1e-12)
    assert torch.equal(score(UncertaintyWeighted(three(), 0.0)), score(Mean(three())))
    alone = score(UncertaintyWeighted([channel(0)], 5.0))
    assert torch.equal(alone, table(pixels(7))[0])


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="penalty"):
        UncertaintyWeighted(three(), wrong)
    with pytest.raises(ValueError, match="temperature"):
        SoftMin(three(), wrong)
    with pytest.raises(ValueError, match="take WorstCase"):
        SoftMin(three(), 0.0)


def test_the_sigma_of_a_mean_is_how_far_its_members_disagree():
    found = Mean(three())(pixels(7), prompts(7)).sigma
    np.testing.assert_allclose(found, table(pixels(7)).numpy().std(0), rtol=1e-12)


class Sure(Reward):
    """A channel that states a sigma for each sample: another channel, times a factor."""

    differentiable = True

    def __init__(self, index, factor):
        self.inner, self.factor, self.name = channel(index), factor, channel(index).name

    def __call__(self, images, prompts, metadata=None):
        score = self.inner(images, prompts, metadata)
        return Score(score.value, score.valid, score.parts, self.factor * images[:, 2, 0, 0], score.reasons)


def test_inverse_variance_is_the_least_squares_estimate():
    x = pixels(5)
    score = InverseVariance([Sure(0, 1.0), Sure(1, 2.0)])(x, prompts(5))
    r, s = table(x)[:2].numpy(), np.outer([1.0, 2.0], x[:, 2, 0, 0])
    for i in range(5):
        # the normal equations of r_k = m + error_k, each divided by its sigma
        solution, *_ = np.linalg.lstsq(1 / s[:, i : i + 1], r[:, i] / s[:, i], rcond=None)
        assert score.value[i].item() == pytest.approx(solution[0], rel=1e-12)
        design = 1 / s[:, i]
        assert score.sigma[i].item() == pytest.approx((design @ design) ** -0.5, rel=1e-12)


def test_no_gradient_flows_through_a_sigma():
    x = pixels(3).requires_grad_()
    score = InverseVariance([Sure(0, 1.0), mean(channel(1), channel(2))])(x, prompts(3))  # sigmas of different pixels
    score.value.sum().backward()
    blue = x.detach()[:, 2, 0, 0]
    first, second = blue**-2, ((x.detach()[:, 1, 0, 0] - blue) / 2) ** -2
    share = first / (first + second)
    expected = torch.stack([share, (1 - share) / 2, (1 - share) / 2], dim=1)
    torch.testing.assert_close(x.grad[:, :, 0, 0], expected)
    assert not score.sigma.requires_grad


def test_a_member_without_sigma_is_named():
    with pytest.raises(ValueError, match="'green' states no sigma"):
        InverseVariance([Sure(0, 1.0), channel(1)])(pixels(2), prompts(2))


def test_a_sigma_of_zero_fails_its_sample_and_no_gradient():
    # Two ensembles that agree on sample 0: their sigma is 0 there, and the slope of a square root infinite.
    x = pixels(2)
    x[0] = 0.5
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    first, second = mean(channel(0), channel(1)), mean(channel(1, name="g"), channel(2))
    score = InverseVariance([first, second])(x * weight, prompts(2))
    assert score.valid.tolist() == [False, True]
    assert "the sigma of mean(red, green) is 0.0" in score.reasons[0]
    torch.where(score.valid, score.value, 0.0).sum().backward()
    assert weight.grad.isfinite()
    assert {A, B, "g", "mean(red, green)"} < set(score.parts)
