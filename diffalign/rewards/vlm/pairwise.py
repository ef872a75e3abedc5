"""A judge that compares the images of one prompt two by two, in both orders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.vlm.judge import Judge, JudgeReward, Question
from diffalign.rewards.vlm.questions import PAIRWISE, filled


class PairwiseJudge(JudgeReward):
    """Win rate of each image against the others of its prompt, in [0, 1].

    With p(i, j) the probability that the judge prefers the first of (image i, image j), i beats j by
    w_ij = (p(i, j) + 1 - p(j, i)) / 2, and the score of i is the mean of w_ij over its valid pairs.

    The win rate over all pairs of a group is Pref-GRPO's, Wang et al. (2025), arXiv:2508.20751. Departures: it judges a
    pair in one order, counts an answer that cannot be read as half a win, and each comparison is won or lost. Here the
    swap cancels a judge's preference for a position (Zheng et al., 2023, arXiv:2306.05685, who call a tie what is not
    won in both orders), a pair without an answer in both orders is left out, and wins are probabilities; a
    judge that is read as text gives 1, 1/2 or 0.

    A group is the images of a call that have the same prompt: n of them take n (n - 1) questions of two images each. An
    image without a valid pair, and so one that is alone, is a failed score.

    Args:
        judge: `LocalVLM` of a model that takes two images, or `JudgeServer`.
        question: template that asks for 1 or 2.
        principle: a standard to judge by, put before the question.
        name: default: that of the judge.
    """

    groupwise = True

    def __init__(
        self, judge: Judge, question: str = PAIRWISE, *, principle: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(judge, question, principle=principle, name=name)

    def _score_rows(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        """Not one by one after a failure, as for other rewards: an image alone has no pair."""
        groups = self._groups(images, prompts)
        pairs = _ordered_pairs(groups)
        questions = [self._ask(pair, images, prompts, metadata) for pair in pairs]
        first, lost = {}, {}
        if questions:
            answers = self.judge.answers(questions, ("1", "2"))
            chance = answers.log_probs.double().softmax(dim=1)[:, 0].tolist()
            first = {pair: p for pair, p in zip(pairs, chance, strict=True) if math.isfinite(p)}
            lost = {pairs[index]: reason for index, reason in answers.reasons.items()}
        wins = defaultdict(list)
        for (i, j), p in first.items():
            if (j, i) in first:
                wins[i].append((p + 1 - first[j, i]) / 2)
        rates, reasons = [math.nan] * len(prompts), {}
        for i, group in enumerate(groups):
            if i in wins:
                rates[i] = math.fsum(wins[i]) / len(wins[i])
            else:
                reasons[i] = self._alone(prompts[i]) if groups.count(group) == 1 else _no_pair(i, lost)
        return torch.tensor(rates, device=images.device), reasons

    def _groups(self, images: Tensor, prompts: list[str]) -> list[Any]:
        """What two samples have in common that are compared."""
        return list(prompts)

    def _ask(
        self, pair: tuple[int, int], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Question:
        i, j = pair
        return Question((images[i], images[j]), filled(self.question, prompts[i], self.principle))

    def _alone(self, prompt: str) -> str:
        return f"it is the only image of the prompt {prompt[:80]!r}, and a pairwise judge needs two"


def _ordered_pairs(groups: Sequence[Any]) -> list[tuple[int, int]]:
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [pair for group in members.values() for pair in permutations(group, 2)]


def _no_pair(index: int, lost: dict[tuple[int, int], str]) -> str:
    told = [reason for pair, reason in lost.items() if index in pair] or ["the answers are not numbers"]
    return f"no pair could be judged; the first: {told[0]}"
