"""Text answers about an image, compared two by two by a judge that reasons: R1-Reward's form."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.vlm.cache import pixel_digest
from diffalign.rewards.vlm.judge import AnswerError, Judge, Question
from diffalign.rewards.vlm.pairwise import PairwiseJudge
from diffalign.rewards.vlm.questions import filled
from diffalign.rewards.vlm.written import AnswerForm, WrittenPairs


def read_choice(text: str) -> tuple[float]:
    """1 for ``<answer>1</answer>``, 0 for ``<answer>2</answer>``; AnswerError where there is no such choice, or two."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    choice = found[0].strip() if len(found) == 1 else ""
    if choice not in ("1", "2"):
        raise AnswerError(f"the answer {text[:80]!r} has not one <answer> that is 1 or 2, but {found[:3]}")
    return (float(choice == "1"),)


CHOICE = AnswerForm(
    question=(
        "Two answers were given to a question about the picture. Compare them side by side between <think> and "
        "</think>. Then choose the better one, for there is no tie: 1 for the first or 2 for the second, between "
        "<answer> and </answer>.\n\nQuestion:\n{prompt}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}"
    ),
    axes=("choice",),
    parse=read_choice,
)
"""R1-Reward's form of answer, with a question in our own words."""


class AnswerPairs(PairwiseJudge):
    """Win rate of each text answer against the others to the same question about the same image, in [0, 1].

    What is judged is ``metadata["answer"]``, for models that write about images; the prompt is the question. As
    `PairwiseJudge`, it asks for each pair in both orders.

    The form of the judge's text is that of R1-Reward, Zhang et al. (2025), arXiv:2505.02835, as its inference scripts
    have it: a comparison between think tags, then 1 or 2 between answer tags. Departures: the words of the question are
    ours; the scripts take the last 1 or 2 anywhere in a text without tags, call the second the winner where there is
    none, and ask in one order.

    Args:
        judge: `LocalVLM` or `JudgeServer`.
        question: template with the fields prompt, first and second.
        principle: a standard to judge by, put before the question.
        max_tokens: of the judge's text.
        name: default: that of the judge.
    """

    needs = ("prompt", "answer")
    fields = ("prompt", "first", "second")

    def __init__(
        self,
        judge: Judge,
        question: str = CHOICE.question,
        *,
        principle: str | None = None,
        max_tokens: int = 4096,
        name: str | None = None,
    ) -> None:
        super().__init__(WrittenPairs(judge, CHOICE, max_tokens=max_tokens), question, principle=principle, name=name)

    def _score_rows(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[int, str]]:
        rows = [i for i, entry in enumerate(metadata) if isinstance(entry.get("answer"), str)]
        rates = torch.full((len(prompts),), math.nan, device=images.device)
        reasons = dict.fromkeys(set(range(len(prompts))) - set(rows), 'metadata["answer"] is no text')
        found, why = super()._score_rows(images[rows], [prompts[i] for i in rows], [metadata[i] for i in rows])
        rates[rows] = found
        return rates, reasons | {rows[index]: reason for index, reason in why.items()}

    def _groups(self, images: Tensor, prompts: list[str]) -> list[Any]:
        return [(prompt, pixel_digest(image)) for image, prompt in zip(images, prompts, strict=True)]

    def _ask(
        self, pair: tuple[int, int], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Question:
        i, j = pair
        answers = {"first": metadata[i]["answer"], "second": metadata[j]["answer"]}
        return Question((images[i],), filled(self.question, prompts[i], self.principle, **answers))

    def _alone(self, prompt: str) -> str:
        return f"it is the only answer to {prompt[:80]!r} about its image, and a pairwise judge needs two"
