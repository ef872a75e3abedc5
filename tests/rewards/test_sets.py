"""What every set reward keeps: exact credits, proved gradients, no order, failures that leave the set."""

import math

import pytest
import torch

from diffalign.rewards.sets import (
    CMMDReward,
    CoverageReward,
    DensityReward,
    FrechetReward,
    KIDReward,
    PrecisionReward,
    RecallReward,
    SetReward,
    VendiReward,
)

REFERENCE = 14
MAKERS = {
    "frechet": FrechetReward,
    "kid": KIDReward,
    "cmmd": CMMDReward,
    "vendi": lambda reference, encoder=None: VendiReward(encoder),
    "precision": PrecisionReward,
    "recall": RecallReward,
    "density": DensityReward,
    "coverage": CoverageReward,
}
SMOOTH = ("frechet", "kid", "cmmd", "vendi")
# (samples, dimensions): more samples than dimensions, fewer, and fewer exemplars than dimensions
SHAPES = ((11, 4), (5, 7), (5, 16))


def features(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Not Gaussian and not centred, so that no term is zero by symmetry."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.linspace(0.5, 1.5, width) + 0.3 * noise.square() + 0.2


def make(name: str, width: int, encoder=None) -> SetReward:
    return MAKERS[name](features(REFERENCE, width, seed=1) - 0.3, encoder)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_credits_equal_recomputation_without_each_sample(name, shape):
    x = features(*shape)
    x[3] = x[1]  # a repeated sample: ties among the neighbours, a spectrum of lower rank
    reward = make(name, shape[1])
    brute = SetReward.credit(reward, x)
    assert torch.allclose(reward.credit(x), brute, rtol=1e-9, atol=1e-7)
    if name in SMOOTH or shape == (11, 4):  # far from every exemplar, a count has nothing to share out
        assert brute.abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_finite_differences(name, shape):
    reward = make(name, shape[1])
    x = features(*shape).requires_grad_()
    assert torch.autograd.gradcheck(reward.value, (x,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_the_order_of_the_samples_does_not_matter(name):
    x, reward = features(11, 4), make(name, 4)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    score, moved = reward(x), reward(x[order])
    assert math.isclose(score.value, moved.value, rel_tol=1e-11)
    assert torch.allclose(score.credit[order], moved.credit, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", SMOOTH)
def test_float32_features_are_scored_in_float64_and_get_float32_gradients(name):
    x, reward = features(11, 4).float(), make(name, 4)
    score = reward(x.requires_grad_())
    assert score.value.dtype == score.credit.dtype == torch.float64
    assert math.isclose(score.value.detach(), reward.value(x.detach().double()), rel_tol=1e-13)
    assert not score.credit.requires_grad
    score.value.backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["precision", "recall", "density", "coverage"])
def test_counts_have_no_gradient_and_do_not_say_so(name):
    score = make(name, 4)(features(11, 4).requires_grad_())
    assert not score.value.requires_grad


@pytest.mark.parametrize("name", MAKERS)
def test_a_sample_that_failed_leaves_the_set(name):
    x, reward = features(11, 4), make(name, 4)
    x[0, 1], x[6, 2] = math.nan, math.inf
    score, rest = reward(x), reward(torch.cat([x[1:6], x[7:]]))
    assert score.value == rest.value
    assert score.valid.tolist() == [i not in (0, 6) for i in range(11)]
    assert score.credit[[0, 6]].isnan().all()
    assert torch.equal(score.credit[score.valid], rest.credit)
    assert score.reasons == dict.fromkeys((0, 6), "its features are not finite")


def colours(images: torch.Tensor) -> torch.Tensor:
    """An encoder: means and squared means of the channels."""
    means = images.mean(dim=(2, 3))
    return torch.cat([means, means.square()], dim=1)


def test_images_are_encoded_and_gradients_reach_the_pixels():
    images = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    exemplars = torch.rand(70, 3, 4, 4, generator=torch.Generator().manual_seed(1)) ** 2  # more than one batch of 64
    reward = FrechetReward(exemplars, colours)
    score = reward(images.requires_grad_())
    given = FrechetReward(colours(exemplars))(colours(images.detach()))
    assert math.isclose(score.value.detach(), given.value, rel_tol=1e-5)
    score.value.backward()
    assert images.grad.flatten(1).norm(dim=1).gt(0).all()


def test_an_encoder_that_fails_on_one_image_costs_that_image_alone():
    def fragile(images):
        if (images > 0.99).all(dim=(1, 2, 3)).any():
            raise RuntimeError("a white image")
        return colours(images)

    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9
    rest = VendiReward(fragile)(torch.cat([images[:2], images[3:]]))
    images[2] = 1.0
    score = VendiReward(fragile)(images)
    assert score.reasons == {2: "RuntimeError: a white image"}
    assert math.isclose(score.value, rest.value, rel_tol=1e-6)
    assert score.credit[2].isnan()
    with pytest.raises(RuntimeError, match="a white image"):  # a broken encoder is no bad sample
        VendiReward(fragile)(torch.ones(3, 3, 4, 4))


def test_an_image_with_pixels_that_are_not_finite_is_not_encoded():
    def blind(images):
        return colours(images.nan_to_num(0.0))

    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rest = VendiReward(blind)(torch.cat([images[:2], images[3:]]))
    images[2, 0, 0, 0] = math.nan
    score = VendiReward(blind)(images)
    assert score.reasons == {2: "the image has pixels that are not finite"}
    torch.testing.assert_close(score.value, rest.value)
    with pytest.raises(ValueError, match="nothing to encode: the image has pixels"):
        VendiReward(blind)(torch.full((3, 3, 4, 4), math.nan))


def test_what_cannot_be_scored_is_said():
    reward = make("kid", 4)
    cases = (
        (lambda: reward(features(2, 4)), "at least 3 samples"),
        (lambda: reward(features(5, 6)), "6 dimensions and its reference 4"),
        (lambda: reward(torch.rand(5, 3, 4, 4)), "has no encoder"),
        (lambda: make("recall", 4)(features(4, 4)), "at least 5 samples"),
        (lambda: VendiReward(colours)(2 * torch.rand(5, 3, 4, 4) - 1), "pixels in"),
        (lambda: VendiReward(lambda x: x)(torch.rand(5, 3, 4, 4)), r"must give floating features \(5, D\)"),
        (lambda: PrecisionReward(features(3, 4)), "at least 4"),
        (lambda: PrecisionReward(features(5, 4), k=0), "k of 'precision' is 0"),
        (lambda: FrechetReward(torch.full((3, 2), math.nan)), "exemplar 0"),
    )
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="int64"):
        reward(torch.ones(5, 4, dtype=torch.long))


def test_a_new_set_reward_needs_its_value_only():
    class Spread(SetReward):
        name = "spread"
        differentiable = True

        def value(self, features):
            return features.var(dim=0, correction=0).sum()

    x = features(5, 3)
    score = Spread()(x)
    without = [torch.cat([x[:i], x[i + 1 :]]).var(dim=0, correction=0).sum() for i in range(5)]
    assert torch.allclose(score.credit, score.value - torch.stack(without))
    assert Spread(name="other").name == "other"
