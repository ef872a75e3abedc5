"""Any image reward on the frames of a video: InstructVideo, Yuan et al. (2023), arXiv:2312.12490, section 4.2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from diffalign.media import uniform_indices
from diffalign.rewards.base import Metadata, Reward, Score, check_input

Sampling = Literal["segments", "uniform", "all"]


class FrameReward(Reward):
    """mean_k w_k r(x_{i_k}), the mean of an image reward over frames i_1, ..., i_S of the video's F.

    The weight w_k = exp(-attenuation |i_k - floor(F / 2)|) is InstructVideo's temporally attenuated reward: the further
    a frame from the middle, the less it counts. The weights are not normalised, as in its code: attenuation makes the
    score smaller. Differentiable where the image reward is. A video fails if one of its frames does.

    Departures: InstructVideo draws one frame of each segment at random at every step; here it is the segment's middle
    frame, so that a score is a function of the video alone. In training only the chosen frames get a gradient: take
    ``sampling="all"`` where the memory is there. Its code publishes no value of the attenuation; here it is 0.

    Args:
        reward: of images; what it reads is kept.
        sampling: "segments": the middle of each of ``number`` segments of floor(F / number) frames, what is left over
            at the end is in none. "uniform": ``number`` frames at equal distances, first and last included. "all".
        number: of frames; InstructVideo's configuration has 4. A video with fewer is a failed score for "segments".
        attenuation: lambda, for each frame of distance.
        name: default: the image reward's name and "-frames".
    """

    media = "video"

    def __init__(
        self,
        reward: Reward,
        sampling: Sampling = "segments",
        number: int = 4,
        attenuation: float = 0.0,
        name: str | None = None,
    ) -> None:
        if reward.media != "image" or reward.groupwise:
            raise ValueError(f"reward {reward.name!r} does not score one image by itself: it cannot score frames.")
        if sampling not in ("segments", "uniform", "all"):
            raise ValueError(f"sampling is {sampling!r}: use segments, uniform or all.")
        if number < 1:
            raise ValueError(f"number is {number}: at least one frame is scored.")
        if not (math.isfinite(attenuation) and attenuation >= 0):
            raise ValueError(f"attenuation is {attenuation}: it must be 0 or more.")
        self.reward, self.sampling, self.number, self.attenuation = reward, sampling, number, attenuation
        self.name = name or f"{reward.name}-frames"
        self.differentiable = reward.differentiable
        self.needs, self.optional, self.token_limit = reward.needs, reward.optional, reward.token_limit

    def to(self, device: torch.device | str) -> Self:
        """Moves the image reward."""
        self.reward.to(device)
        return self

    def walk(self) -> Iterator[Reward]:
        """The reward itself, the image reward and every one inside that."""
        yield self
        yield from self.reward.walk()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Score:
        """Scores videos (B, F, 3, H, W), float in [0, 1], by their frames; a video fails if a frame of it does.

        ``parts`` holds the parts of the image reward too, as means over the frames.
        """
        prompts, metadata = list(prompts), list(metadata) if metadata is not None else [{} for _ in prompts]
        reasons = check_input(images, prompts, metadata, self.media)
        count = images.shape[1]
        try:
            index = self.frame_indices(count)
        except ValueError as error:
            lost = torch.full((len(prompts),), math.nan, device=images.device)
            return self._score(lost, {}, dict.fromkeys(range(len(prompts)), str(error)))
        frames = images[:, index].flatten(0, 1)
        score = self.reward(frames, _repeated(prompts, len(index)), _repeated(metadata, len(index)))
        for place, reason in sorted(score.reasons.items()):
            video, frame = divmod(place, len(index))
            reasons.setdefault(video, f"frame {index[frame]}: {reason}")
        weights = score.value.new_tensor([math.exp(-self.attenuation * abs(i - count // 2)) for i in index])
        shape = (len(prompts), len(index))
        value = (score.value.unflatten(0, shape) * weights).mean(dim=1)
        parts = {name: part.unflatten(0, shape).mean(dim=1) for name, part in score.parts.items()}
        return self._score(value, parts, reasons)

    def _score(self, value: Tensor, parts: dict[str, Tensor], reasons: dict[int, str]) -> Score:
        valid = torch.ones(len(value), dtype=torch.bool, device=value.device)
        valid[list(reasons)] = False
        self._tell(reasons)
        value = value.where(valid, math.nan)
        return Score(value, valid, parts | {self.name: value.detach()}, None, reasons)

    def frame_indices(self, count: int) -> list[int]:
        """Which of a video's ``count`` frames are scored."""
        if self.sampling == "all":
            return list(range(count))
        if self.sampling == "uniform":
            return uniform_indices(count, self.number)
        span = count // self.number
        if span == 0:
            raise ValueError(f"the video has {count} frames, and {self.number} segments need one each")
        return [segment * span + span // 2 for segment in range(self.number)]


def _repeated(entries: list[Any], times: int) -> list[Any]:
    return [entry for entry in entries for _ in range(times)]
