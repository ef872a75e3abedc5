"""Scores that a judge writes into a text: ratings of one image, and comparisons of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffalign.rewards.vlm.judge import Answers, Judge, JudgeReward, Question


@dataclass(frozen=True)
class AnswerForm:
    """A question that asks for a text of a known form, and how its numbers are read.

    Attributes:
        question: template, see `questions`.
        axes: what the numbers are about, in their order.
        parse: text -> one number for each axis; `AnswerError` where they are not there, once each and in range.
    """

    question: str
    axes: tuple[str, ...]
    parse: Callable[[str], tuple[float, ...]]

    def choose(self, axis: str) -> Callable[[tuple[float, ...]], float]:
        """What takes the number of one axis, or the mean of all, from what ``parse`` returned."""
        if axis == "mean":
            return lambda numbers: math.fsum(numbers) / len(numbers)
        if axis not in self.axes:
            raise ValueError(f"axis is {axis!r}: use mean or one of {', '.join(self.axes)}.")
        place = self.axes.index(axis)
        return lambda numbers: numbers[place]


class WrittenRating(JudgeReward):
    """The rating that a judge writes about each image, read by an `AnswerForm`; no gradient.

    An answer that is cut off, lacks a number, has it twice or outside its range is a failed score, and the reason
    holds the answer's first words.

    Args:
        judge: `LocalVLM` or `JudgeServer`.
        form: the question and how its answer is read, such as those of `unified_reward`.
        axis: one of the form's, or "mean".
        question: template in the place of the form's own, which asks for the same form of answer.
        principle: a standard to judge by, put before the question.
        max_tokens: of an answer.
        name: default: that of the judge.
    """

    def __init__(
        self,
        judge: Judge,
        form: AnswerForm,
        *,
        axis: str = "mean",
        question: str | None = None,
        principle: str | None = None,
        max_tokens: int = 1024,
        name: str | None = None,
    ) -> None:
        super().__init__(judge, form.question if question is None else question, principle=principle, name=name)
        self.form, self.max_tokens = form, max_tokens
        self.axis, self.choose = axis, form.choose(axis)
        self.needs = ("prompt",) if "{prompt}" in self.question else ()

    def _score_rows(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        """Not one by one after a failure, as for other rewards: the judge knows which question failed."""
        read = self.judge.readings(self._questions(images, prompts), self.form.parse, self.max_tokens)
        rows = [math.nan if numbers is None else self.choose(numbers) for numbers in read.numbers]
        return torch.tensor(rows, device=images.device), read.reasons


class WrittenPairs(Judge):
    """A judge whose comparisons are read from texts, for `PairwiseJudge`: which asks in both orders and averages.

    The number that the form reads is the first image's share of the win, in [0, 1]; it takes the place of the
    probability that the first is preferred.

    Args:
        judge: `LocalVLM` of a model that takes two images, or `JudgeServer`.
        form: how an answer is read. The question is that of the `PairwiseJudge`.
        axis: one of the form's, or "mean".
        max_tokens: of an answer.
    """

    gives_probabilities = False

    def __init__(self, judge: Judge, form: AnswerForm, *, axis: str = "mean", max_tokens: int = 1024) -> None:
        self.judge, self.form, self.max_tokens = judge, form, max_tokens
        self.axis, self.choose = axis, form.choose(axis)
        self.name = judge.name

    def to(self, device: torch.device | str) -> Self:
        """Moves the judge."""
        self.judge.to(device)
        return self

    def answers(self, questions: Sequence[Question], words: Sequence[str]) -> Answers:
        """Log of the two shares, for the words 1 and 2."""
        if tuple(words) != ("1", "2"):
            raise ValueError(f"the words are {', '.join(words)}: a comparison of two images knows 1 and 2 only.")
        read = self.judge.readings(questions, self.form.parse, self.max_tokens)
        first = [math.nan if numbers is None else self.choose(numbers) for numbers in read.numbers]
        shares = torch.tensor([[share, 1 - share] for share in first], dtype=torch.float64)
        return Answers(shares.log(), read.reasons)
