"""Sums of rewards standardised within the samples of a prompt: against numpy and closed forms."""

import math

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.rewards import GroupStandardised
from tests.rewards.channels import A, B, channel, fails_on, pixels, prompts, table

TEXTS = ["a", "b", "b", "a", "b", "a", "b"]


def by_numpy(values, texts, weights):
    """Group by group, with numpy's standard deviation of N - 1."""
    total = np.zeros(len(texts))
    for text in set(texts):
        rows = [i for i, each in enumerate(texts) if each == text]
        for weight, reward in zip(weights, values, strict=True):
            deviation = np.std(reward[rows], ddof=1)
            total[rows] += weight * (reward[rows] - np.mean(reward[rows])) / (deviation + 1e-8)
    return total


def test_each_reward_is_standardised_in_its_group():
    x = pixels(7)
    score = GroupStandardised([(channel(0), 1.0), (channel(1), -0.5)])(x, TEXTS)
    np.testing.assert_allclose(score.value, by_numpy(table(x)[:2].numpy(), TEXTS, (1.0, -0.5)), rtol=1e-12)
    torch.testing.assert_close(score.parts[A], table(x)[0])
    torch.testing.assert_close(score.parts[B], table(x)[1])


def test_three_samples_in_closed_form():
    x = torch.zeros(3, 3, 1, 1, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.3, 0.7])
    expected = torch.tensor([-0.2, -0.1, 0.3]) / math.sqrt((0.04 + 0.01 + 0.09) / 2)
    found = GroupStandardised([(channel(0), 2.0)])(x, ["p"] * 3).value
    torch.testing.assert_close(found, 2 * expected.double(), rtol=1e-6, atol=0)


def test_scales_and_shifts_do_not_matter_and_weights_do():
    x = pixels(6)
    plain = GroupStandardised([(channel(0), 1.0), (channel(1), 1.0)])(x, ["p"] * 6).value
    scaled = GroupStandardised([(channel(0, scale=64.0, shift=-3.0), 1.0), (channel(1, scale=0.25), 1.0)])
    torch.testing.assert_close(scaled(x, ["p"] * 6).value, plain, rtol=1e-6, atol=1e-6)
    heavy = GroupStandardised([(channel(0), 3.0), (channel(1), 1.0)])(x, ["p"] * 6).value
    alone = GroupStandardised([(channel(0), 2.0)])(x, ["p"] * 6).value
    torch.testing.assert_close(heavy - plain, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_whose_scores_are_equal_says_nothing(dtype):
    """In float32 the mean of equal numbers may be another number, and its distance over 1e-8 is no small one."""
    x = torch.full((7, 3, 1, 1), 0.1, dtype=dtype)
    value = GroupStandardised([(channel(0, scale=1 / 3), 1.0)])(x, ["p"] * 7).value
    torch.testing.assert_close(value, torch.zeros(7, dtype=dtype), rtol=0, atol=1e-6)
    assert GroupStandardised([(channel(0), 1.0)])(pixels(4), prompts(4)).value.tolist() == [0.0] * 4  # each alone


def test_a_failed_sample_leaves_its_group():
    x, texts = pixels(6), ["p", "p", "q", "p", "q", "p"]
    x[3, 0] = math.nan
    score = GroupStandardised([(channel(0), 1.0), (channel(1), 0.5)])(x, texts)
    rows = [0, 1, 2, 4, 5]
    expected = by_numpy(table(x)[:2, rows].numpy(), [texts[i] for i in rows], (1.0, 0.5))
    np.testing.assert_allclose(score.value[rows], expected, rtol=1e-12)
    assert score.valid.tolist() == [True, True, True, False, True, True]
    lost = GroupStandardised([(channel(0), 1.0), (fails_on(1, "q"), 0.5)])(pixels(6), texts)
    assert lost.valid.tolist() == [text == "p" for text in texts]


def test_groups_are_whole_and_there_is_no_gradient():
    reward = GroupStandardised([(channel(0), 1.0), (channel(1), 0.5)])
    assert reward.groupwise
    assert not reward.differentiable
    assert "prompt" in reward.needs
    assert reward.name == "group-z(red) + 0.5*group-z(green)"
    assert not reward(pixels(3).requires_grad_(), ["p"] * 3).value.requires_grad
    with pytest.raises(ValueError, match="not finite"):
        GroupStandardised([(channel(0), math.inf)])


def test_the_shipped_mix_of_dancegrpo_names_what_it_is_made_of():
    recipe = rewards.read_recipe(rewards.shipped_recipes()["dancegrpo"])
    preference, clip = recipe.terms
    assert (preference.reward, preference.weight, clip.weight) == ("hpsv2.1", 0.7, 1.4)
    inner = rewards.REWARD_TYPES.get(clip.reward["type"]).model_validate(clip.reward)
    assert inner.path == "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"


def test_rounding_is_no_spread():
    """Scores that differ in the last bits of a float32 say nothing; over their spread they would say everything."""
    x = torch.zeros(4, 3, 1, 1)
    x[:, 0, 0, 0] = torch.tensor([0.3, 0.3, 0.3 + 3e-8, 0.3])
    assert len(x.unique()) > 2
    assert not GroupStandardised([(channel(0), 1.0)])(x, ["a"] * 4).value.any()
