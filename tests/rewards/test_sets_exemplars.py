"""Exemplar rewards of single samples, of one embedding and of several, and of another modality."""

import math

import pytest
import torch

from diffalign.rewards import check_gradient
from diffalign.rewards.sets import CMMDReward, ExemplarReward, FeatureStatistics, FrechetReward, frechet_distance


def images(count: int, seed: int = 0, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3))


def patches(images: torch.Tensor) -> torch.Tensor:
    """(B, 16, 3): the mean colour of every 2 x 2 patch."""
    return torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2)


def test_one_embedding_is_a_point():
    """-|x - mean|^2 - tr C."""
    exemplars = images(20, seed=1)
    calls = []
    reward = ExemplarReward(means(exemplars), lambda x: calls.append(len(x)) or means(x))
    x, e = images(5), means(exemplars)
    expected = -(means(x) - e.mean(dim=0)).square().sum(dim=1) - e.var(dim=0).sum()
    assert torch.allclose(reward(x, [""] * 5).value, expected, rtol=1e-12)
    assert calls == [5]  # in one batch


def test_several_embeddings_are_a_distribution_each():
    reference = FeatureStatistics.of(patches(images(6, seed=1)).flatten(0, 1))
    reward = ExemplarReward(reference, patches)
    x = images(4) ** 2
    score = reward(x, [""] * 4)
    for image, value in zip(x, score.value, strict=True):
        own = FeatureStatistics.of(patches(image[None])[0])
        assert math.isclose(-frechet_distance(own, reference), value, rel_tol=1e-10)
        assert math.isclose(reward(image[None], [""]).value, value, rel_tol=1e-12)  # whoever else is in the batch
    assert check_gradient(reward, x, [""] * 4).gt(0).all()
    x = images(1, size=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""]).value, (x,))


def test_a_failed_sample_is_not_a_number():
    reward = ExemplarReward(images(20, seed=1), means)
    x = images(3)
    x[1] = math.nan
    score = reward(x, [""] * 3)
    assert score.valid.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="at least 2"):
        ExemplarReward(images(1), means)


def test_exemplars_of_another_modality():
    """Features of words as exemplars, an encoder of pictures into their space: one sample or a set at a time."""
    words = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "dark red": [0.5, 0, 0]}
    wishes = torch.tensor([words["red"], words["dark red"]], dtype=torch.float64)
    x = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    for image, colour in zip(x, ([0.7, 0, 0], words["green"], [0.75, 0, 0], [0.6, 0.2, 0]), strict=True):
        image += torch.tensor(colour, dtype=torch.float64)[:, None, None]
    single = ExemplarReward(wishes, means)(x, [""] * 4)
    assert single.value.argsort(descending=True).tolist() == [2, 0, 3, 1]
    for reward in (FrechetReward(wishes, means), CMMDReward(wishes, means)):
        score = reward(x)
        assert score.credit.argmin() == 1  # green is what keeps the set from the wish
        assert reward(x[[0, 2, 3]]).value > score.value
