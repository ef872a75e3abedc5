"""How a video moves, from its pixels alone: smoothness and amount of motion, without weights, differentiable.

The questions are those of VBench, Huang et al. (2023), arXiv:2311.17982; the answers are simpler and **not VBench's
numbers**: VBench interpolates frames with AMT and measures motion with RAFT's optical flow, both learned networks. Here
neighbours are averaged and frames subtracted, so that brightness that flickers counts as motion, and so does texture
more than plain areas. Compare videos of one frame rate only: with more frames a second neighbours differ less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.rewards.base import Reward

_TOP = 0.05  # of the pixels, as VBench takes of the flow


class MotionSmoothness(Reward):
    """1 - mean_t mean |x_t - (x_{t-1} + x_{t+1}) / 2|, over the inner frames, their pixels and colours; in [0, 1].

    A still video, and one that fades evenly, has 1; jumps and flicker lower it, and so does fast motion of edges, which
    an average of neighbours does not follow. VBench likewise compares frames with what their neighbours predict, every
    second frame only, and by a network that does follow motion. A reward for it alone makes videos stand still: weigh
    it against `DynamicDegree`.
    """

    media = "video"
    differentiable = True
    needs = ()

    def __init__(self, name: str = "motion-smoothness") -> None:
        self.name = name

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,) of videos (B, F, 3, H, W). ValueError for fewer than three frames."""
        _check_frames(images, 3)
        surprise = images[:, 1:-1] - (images[:, :-2] + images[:, 2:]) / 2
        return 1 - surprise.abs().flatten(1).mean(dim=1)


class DynamicDegree(Reward):
    """The mean over pairs of neighbouring frames of the mean change of the 5 % of pixels that change most; in [0, 1].

    The change of a pixel is mean_c |x_{t+1,c} - x_{t,c}|; a still video has 0. VBench takes the same 5 % of the optical
    flow's length, in pixels, and says yes or no by a threshold; here the degree itself is the score.
    """

    media = "video"
    differentiable = True
    needs = ()

    def __init__(self, name: str = "dynamic-degree") -> None:
        self.name = name

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,) of videos (B, F, 3, H, W). ValueError for a single frame."""
        _check_frames(images, 2)
        change = (images[:, 1:] - images[:, :-1]).abs().mean(dim=2).flatten(2)
        top = max(int(change.shape[-1] * _TOP), 1)
        return change.topk(top, dim=-1).values.mean(dim=(1, 2))


def _check_frames(videos: Tensor, least: int) -> None:
    if videos.shape[1] < least:
        raise ValueError(f"the video has {videos.shape[1]} frames, and motion needs at least {least}")
