"""Motion from pixels: closed forms, order of obvious cases, gradients."""

import math

import pytest
import torch

from diffalign import rewards
from diffalign.rewards.motion import DynamicDegree, MotionSmoothness


def video(levels, size=8):
    """Frame t is levels[t] everywhere."""
    return torch.tensor(levels, dtype=torch.float64)[None, :, None, None, None].expand(1, len(levels), 3, size, size)


def blob(speed, frames=9, size=48):
    """A soft spot that moves ``speed`` pixels a frame."""
    place = torch.arange(size, dtype=torch.float64)
    along = torch.exp(-((place[None] - 10 - speed * torch.arange(frames)[:, None]) ** 2) / 18)
    across = torch.exp(-((place - 24) ** 2) / 18)
    return (along[:, None, None, :] * across[None, None, :, None]).expand(frames, 3, size, size)[None]


def test_smoothness_of_fades_and_flicker():
    reward = MotionSmoothness()
    assert reward(video([0.3] * 5), [""]).value.item() == 1
    assert reward(video([0.0, 0.25, 0.5, 0.75]), [""]).value.item() == 1
    # a flicker of 0.5 is off by 0.5 in every inner frame, one jump of 0.5 by half of that in two of three
    assert reward(video([0.0, 0.5, 0.0, 0.5]), [""]).value.item() == 0.5
    assert reward(video([0.0, 0.0, 0.5, 0.5, 0.5]), [""]).value.item() == pytest.approx(1 - 2 * 0.25 / 3, rel=1e-12)


def test_degree_counts_the_pixels_that_change_most():
    reward = DynamicDegree()
    assert reward(video([0.3] * 4), [""]).value.item() == 0
    assert reward(video([0.0, 0.5, 0.5]), [""]).value.item() == 0.25
    moving = torch.zeros(1, 2, 3, 10, 10)
    moving[0, 1, 0, 0, :3] = 0.9  # in one colour of three pixels, of which and of two others the five are made
    assert reward(moving, [""]).value.item() == pytest.approx(0.3 * 3 / 5, rel=1e-6)
    tiny = torch.zeros(1, 2, 3, 2, 2)
    tiny[0, 1, :, 0, 0] = 1
    assert reward(tiny, [""]).value.item() == 1  # of four pixels one is looked at


def test_order_of_obvious_cases():
    still, slow, fast = blob(0.0), blob(0.5), blob(3.0)
    shuffled = fast[:, [0, 5, 2, 7, 1, 8, 3, 6, 4]]
    batch = torch.cat([still, slow, fast, shuffled])
    smooth = MotionSmoothness()(batch, [""] * 4).value
    assert (smooth.diff() < 0).all()
    assert (DynamicDegree()(batch, [""] * 4).value[:3].diff() > 0).all()
    alone = MotionSmoothness()(fast, [""]).value
    torch.testing.assert_close(alone[0], smooth[2])


@pytest.mark.parametrize("reward", [MotionSmoothness(), DynamicDegree()])
def test_gradients(reward):
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(2, 4, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["", ""]).value, (batch,), atol=1e-6)
    assert (rewards.check_gradient(reward, batch.detach(), ["", ""]) > 0).all()


@pytest.mark.parametrize(("reward", "least"), [(MotionSmoothness(), 3), (DynamicDegree(), 2)])
def test_too_few_frames_and_broken_ones_are_failed_scores(reward, least):
    short = reward(torch.rand(1, least - 1, 3, 4, 4), [""])
    assert not short.valid.any()
    assert f"at least {least}" in short.reasons[0]
    batch = torch.rand(2, 4, 3, 4, 4)
    batch[0, 1, 0, 0, 0] = math.nan
    assert reward(batch, ["", ""]).valid.tolist() == [False, True]
