"""Rewards made of rewards: each member scores once, a failure of one is a failure of the whole, every part is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, Score


class Combination(Reward):
    """A reward of other rewards. Subclasses write ``combine``.

    Args:
        members: the rewards, each of another name.
        name: of the whole.
    """

    def __init__(self, members: Sequence[Reward], name: str) -> None:
        self.members = list(members)
        self.name = name
        self.differentiable = all(member.differentiable for member in self.members)
        self.groupwise = any(member.groupwise for member in self.members)
        self.needs = tuple(dict.fromkeys(need for member in self.members for need in member.needs))
        self.media = self.members[0].media
        for member in self.members:
            if member.media != self.media:
                raise ValueError(
                    f"{member.name!r} scores a {member.media} and {self.members[0].name!r} a {self.media}: "
                    "one combination scores one kind"
                )

    def combine(self, scores: list[Score]) -> Tensor:
        """The whole's values (B,) from each member's score; what a member could not score is NaN there."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """Moves every member."""
        for member in self.members:
            member.to(device)
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Score:
        """Scores each member once and combines. A sample is valid where every member is, and the result finite."""
        scores = [member(images, prompts, metadata) for member in self.members]
        parts: dict[str, Tensor] = {}
        reasons: dict[int, str] = {}
        for member, score in zip(self.members, scores, strict=True):
            parts |= score.parts
            for index, reason in score.reasons.items():
                reasons.setdefault(index, f"{member.name}: {reason}")
        value = self.combine(scores)
        valid = torch.stack([score.valid for score in scores]).all(dim=0)
        for index in (valid & ~value.detach().isfinite()).nonzero().flatten().tolist():
            reasons[index] = f"{self.name}: the score is {value[index].item()}"
        valid = valid & value.detach().isfinite()
        return Score(value.masked_fill(~valid, math.nan), valid, parts, reasons=reasons)


class WeightedSum(Combination):
    """sum_k w_k r_k. A sample is valid where every part is. Sums inside are flattened, equal parts collected.

    The parts' scales are their own: weights mean something only beside them.
    """

    def __init__(self, terms: Sequence[tuple[Reward, float]], name: str | None = None) -> None:
        collected: dict[str, tuple[Reward, float]] = {}
        for reward, weight in _flatten(terms):
            known, sum_of_weights = collected.get(reward.name, (reward, 0.0))
            if known is not reward:
                raise ValueError(f"two rewards of the sum are named {reward.name!r}: give one of them another name.")
            collected[reward.name] = (reward, sum_of_weights + weight)
        if not collected:
            raise ValueError("a sum of rewards needs at least one reward.")
        self.terms = list(collected.values())
        shown = (reward.name if weight == 1 else f"{weight:g}*{reward.name}" for reward, weight in self.terms)
        super().__init__([reward for reward, _ in self.terms], name or " + ".join(shown))

    def combine(self, scores: list[Score]) -> Tensor:
        """sum_k w_k r_k."""
        return torch.stack([weight * score.value for (_, weight), score in zip(self.terms, scores, strict=True)]).sum(0)


def _flatten(terms: Sequence[tuple[Reward, float]]) -> list[tuple[Reward, float]]:
    flat = []
    for reward, weight in terms:
        if not math.isfinite(weight):
            raise ValueError(f"weight {weight} of reward {reward.name!r} is not finite.")
        inner = reward.terms if isinstance(reward, WeightedSum) else [(reward, 1.0)]
        flat += [(part, weight * factor) for part, factor in inner]
    return flat


def weighted_sum(terms: Sequence[tuple[Reward, float]]) -> Reward:
    """sum_k w_k r_k of (reward, weight) pairs; one reward of weight 1 stays itself."""
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    return WeightedSum(terms)
