"""What a vision-language model is asked, and what it answers: the log-probability of each word that it may answer with.

How the answer becomes a score is the reward's business (`YesLogit`, `Rating`, `PairwiseJudge`); where the model runs is
the judge's (`LocalVLM`, `JudgeServer`). So every reward works with every judge. Judges that were trained to write their
scores into a text answer in one (`WrittenRating`, `WrittenPairs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.vlm.questions import check_template, filled


@dataclass(frozen=True)
class Question:
    """One user turn: the images, then the text.

    Attributes:
        images: each (3, H, W) in [0, 1]; sizes may differ.
        text: the question, which asks for one of a few words, or for a text of a known form.
    """

    images: tuple[Tensor, ...]
    text: str


@dataclass(frozen=True)
class Answers:
    """Answers to Q questions that allow W words.

    Attributes:
        log_probs: (Q, W) log-probability that the first token of the answer is the word, in any case and with or
            without white space around it; -inf where the answer was read as text and is another of the words. A row of
            NaN where the question failed.
        reasons: index of a failed question -> why.
    """

    log_probs: Tensor
    reasons: dict[int, str] = field(default_factory=dict)


class AnswerError(ValueError):
    """An answer that holds no score; the message says why."""


@dataclass(frozen=True)
class Readings:
    """What was read from the texts that answer Q questions.

    Attributes:
        numbers: the numbers in each text, None where the question failed or the text could not be read.
        reasons: index of a failed question -> why.
    """

    numbers: list[tuple[float, ...] | None]
    reasons: dict[int, str] = field(default_factory=dict)


class Judge:
    """A vision-language model that answers questions about images. Subclasses write ``log_probs``, and ``write``.

    Attributes:
        name: of the model.
        differentiable: whether gradients flow from log-probabilities to the images.
        gives_probabilities: False where only the text of the answer is known.
    """

    name: str
    differentiable: bool = False
    gives_probabilities: bool = True

    def log_probs(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        """(Q, W) log-probabilities, see `Answers`; raises where a question cannot be answered."""
        raise NotImplementedError

    def answers(self, questions: Sequence[Question], words: Sequence[str]) -> Answers:
        """As ``log_probs``, without gradients, but a question that fails costs its own answer only."""
        try:
            with torch.no_grad():
                return Answers(self.log_probs(questions, words))
        except Exception as error:
            if len(questions) == 1:
                return Answers(torch.full((1, len(words)), math.nan), {0: f"{type(error).__name__}: {error}"})
        single = [self.answers([question], words) for question in questions]
        reasons = {i: answer.reasons[0] for i, answer in enumerate(single) if answer.reasons}
        device = next((answer.log_probs.device for answer in single if not answer.reasons), "cpu")
        return Answers(torch.cat([answer.log_probs.to(device) for answer in single]), reasons)

    def write(self, question: Question, max_tokens: int) -> str:
        """The text of the most likely answer; AnswerError where ``max_tokens`` did not suffice for it."""
        raise NotImplementedError

    def readings(
        self, questions: Sequence[Question], parse: Callable[[str], tuple[float, ...]], max_tokens: int
    ) -> Readings:
        """Has a text written for each question, and reads it by ``parse``, which raises where it cannot.

        A question that fails costs its own answer only.
        """
        numbers: list[tuple[float, ...] | None] = []
        reasons = {}
        for index, question in enumerate(questions):
            try:
                numbers.append(parse(self.write(question, max_tokens)))
            except Exception as error:
                numbers.append(None)
                reasons[index] = ("" if isinstance(error, AnswerError) else f"{type(error).__name__}: ") + str(error)
        return Readings(numbers, reasons)

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights; a server has none here."""
        return self


class JudgeReward(Reward):
    """A reward that asks a judge. Subclasses write ``values`` or ``_score_rows``.

    Args:
        judge: who is asked.
        question: template of the text, see `questions`.
        principle: a standard to judge by, put before the question.
        name: default: that of the judge.

    Attributes:
        fields: that the question may have.
    """

    fields: tuple[str, ...] = ("prompt",)

    def __init__(self, judge: Judge, question: str, *, principle: str | None = None, name: str | None = None) -> None:
        check_template(question, self.fields)
        self.judge, self.question, self.principle = judge, question, principle
        self.name = name or judge.name

    def to(self, device: torch.device | str) -> Self:
        """Moves the judge."""
        self.judge.to(device)
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,), NaN where there is none."""
        return self._score_rows(images, prompts, metadata)[0]

    def _questions(self, images: Tensor, prompts: list[str]) -> list[Question]:
        """One about each image."""
        return [
            Question((image,), filled(self.question, prompt, self.principle))
            for image, prompt in zip(images, prompts, strict=True)
        ]


class PointwiseReward(JudgeReward):
    """A reward that asks for one word about each image. Subclasses set ``words`` and write ``read``."""

    words: tuple[str, ...]

    def __init__(self, judge: Judge, question: str, *, principle: str | None = None, name: str | None = None) -> None:
        super().__init__(judge, question, principle=principle, name=name)
        self.differentiable = judge.differentiable
        self.needs = ("prompt",) if "{prompt}" in question else ()

    def read(self, log_probs: Tensor) -> Tensor:
        """Scores (B,) from the words' log-probabilities (B, W)."""
        raise NotImplementedError

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """One forward pass or request for each image."""
        return self.read(self.judge.log_probs(self._questions(images, prompts), self.words))

    def _score_rows(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        if self.differentiable:
            return super()._score_rows(images, prompts, metadata)
        # A judge knows which question failed and why: to ask a server a second time, one by one, would cost hours.
        answers = self.judge.answers(self._questions(images, prompts), self.words)
        value = self.read(answers.log_probs.float()).to(images.device)
        reasons = dict(answers.reasons)
        for index in (~value.isfinite()).nonzero().flatten().tolist():
            reasons.setdefault(index, f"the score is {value[index].item()}")
        value[list(reasons)] = math.nan
        return value, reasons
