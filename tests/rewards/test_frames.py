"""An image reward on frames: which frames, with which weight, with the right gradient."""

import math

import pytest
import torch

from diffalign import rewards
from diffalign.rewards.frames import FrameReward


def mean_squared(images, prompts, metadata):
    """A reward with a gradient that differs from pixel to pixel."""
    return (images**2).mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts], dtype=images.dtype)


BRIGHTNESS = rewards.as_reward(lambda images, prompts, metadata: images.mean((1, 2, 3)), name="brightness")


def videos(batch=2, frames=11):
    return torch.rand(batch, frames, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def numbered(frames):
    """Frame i is i / 100 everywhere."""
    return (torch.arange(frames, dtype=torch.float64) / 100)[None, :, None, None, None].expand(1, frames, 3, 2, 2)


@pytest.mark.parametrize(
    ("sampling", "number", "frames", "chosen"),
    [
        ("segments", 4, 16, [2, 6, 10, 14]),
        ("segments", 4, 11, [1, 3, 5, 7]),  # segments of two frames; the last three frames are in none
        ("segments", 3, 3, [0, 1, 2]),
        ("uniform", 4, 16, [0, 5, 10, 15]),
        ("uniform", 1, 16, [0]),
        ("uniform", 9, 5, [0, 1, 2, 3, 4]),
        ("all", 4, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_the_frames_that_count(sampling, number, frames, chosen):
    score = FrameReward(BRIGHTNESS, sampling, number)(numbered(frames), [""])
    assert score.value.item() == pytest.approx(sum(chosen) / len(chosen) / 100, rel=1e-12)


def test_attenuation_by_the_distance_from_the_middle():
    frames, rate = 16, 0.3
    reward = FrameReward(BRIGHTNESS, "segments", 4, attenuation=rate)
    expected = sum(math.exp(-rate * abs(i - 8)) * i / 100 for i in (2, 6, 10, 14)) / 4
    assert reward(numbered(frames), [""]).value.item() == pytest.approx(expected, rel=1e-6)


def test_each_frame_is_scored_as_the_image_reward_scores_it_for_its_own_prompt():
    batch, prompts = videos(3), ["a", "bbb", "cc"]
    reward = FrameReward(rewards.as_reward(mean_squared), "all")
    score = reward(batch, prompts)
    for video, prompt, value in zip(batch, prompts, score.value, strict=True):
        frames = rewards.as_reward(mean_squared)(video, [prompt] * len(video)).value
        torch.testing.assert_close(value, frames.mean())
    assert torch.equal(reward(batch[1:2], prompts[1:2]).value, score.value[1:2])


def test_gradient_equals_finite_differences_and_is_zero_elsewhere():
    batch = videos()[..., :2, :2].clone().requires_grad_()
    reward = FrameReward(rewards.as_reward(mean_squared), "segments", 3, attenuation=0.2)
    gradient = torch.autograd.grad(reward(batch, ["a", "bb"]).value.sum(), batch)[0]
    chosen = reward.frame_indices(11)
    assert chosen == [1, 4, 7]
    assert gradient[:, chosen].abs().min() > 0
    gradient[:, chosen] = 0
    assert not gradient.any()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["a", "bb"]).value, (batch,), atol=1e-6)


def test_a_video_fails_with_its_frame_and_no_other():
    batch = videos(4)
    batch[1, 3] = 0.0
    batch[2, 4] = math.nan  # a frame that is not among those that count
    log = rewards.as_reward(lambda images, prompts, metadata: images.mean((1, 2, 3)).log(), name="log")
    leaf = batch.clone().requires_grad_()
    score = FrameReward(log, "segments", 4)(leaf, [""] * 4)
    assert score.valid.tolist() == [True, False, False, True]
    assert score.reasons == {1: "frame 3: the score is -inf", 2: "the video has pixels that are not finite"}
    expected = batch[[0, 3]][:, [1, 3, 5, 7]].mean((2, 3, 4)).log().mean(1)
    torch.testing.assert_close(score.value[score.valid], expected)
    (gradient,) = torch.autograd.grad(score.value[score.valid].sum(), leaf)
    assert gradient.isfinite().all()
    assert not gradient[1:3].any()
    short = FrameReward(BRIGHTNESS, "segments", 12)(batch, [""] * 4)
    assert not short.valid.any()
    assert "11 frames, and 12 segments need one each" in short.reasons[0]


def test_an_adaptive_reward_on_frames_is_found_and_told_its_parts():
    dark = rewards.as_reward(lambda images, prompts, metadata: 1 - images.mean((1, 2, 3)), name="dark")
    inner = rewards.Lagrangian(BRIGHTNESS, [(dark, 0.9)], rate=2.0)
    reward, batch = FrameReward(inner, "segments", 4), videos(3)
    assert list(reward.walk()) == [reward, inner, BRIGHTNESS, dark]
    score = reward(batch, [""] * 3)
    light = batch[:, [1, 3, 5, 7]].mean((1, 2, 3, 4))
    torch.testing.assert_close(score.value, light)  # the multiplier is still 0
    torch.testing.assert_close(score.parts["dark"], 1 - light)
    for part in reward.walk():
        part.observe({name: float(values.mean()) for name, values in score.parts.items()})
    multiplier = 2 * (0.9 - float((1 - light).mean()))
    assert inner.multipliers["dark"] == pytest.approx(multiplier)
    torch.testing.assert_close(reward(batch, [""] * 3).value, light + multiplier * (0.1 - light))


def test_sums_of_rewards_count_too_and_keep_what_they_need():
    total = 2.0 * BRIGHTNESS + rewards.as_reward(mean_squared)
    total.optional = ("text",)
    reward = FrameReward(total, "all", name="both")
    batch = videos()
    expected = 2 * batch.mean((1, 2, 3, 4)) + (batch**2).mean((1, 2, 3, 4))
    torch.testing.assert_close(reward(batch, ["a", "b"]).value, expected)
    assert reward.differentiable
    assert reward.needs == ("prompt",)
    assert reward.optional == ("text",)
    assert reward.media == "video"


def test_what_cannot_score_frames_is_refused():
    judge = rewards.as_reward(mean_squared, name="judge")
    judge.groupwise = True
    with pytest.raises(ValueError, match="judge"):
        FrameReward(judge)
    with pytest.raises(ValueError, match="frames"):
        FrameReward(FrameReward(BRIGHTNESS))
    for wrong in ({"sampling": "some"}, {"number": 0}, {"attenuation": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FrameReward(BRIGHTNESS, **wrong)
