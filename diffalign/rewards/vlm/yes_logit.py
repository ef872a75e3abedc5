"""How likely a vision-language model says yes: VQAScore and its two relatives."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffalign.rewards.vlm.judge import Judge, PointwiseReward
from diffalign.rewards.vlm.questions import YES_NO

YesScore = Literal["probability", "renormalised", "logit"]


class YesLogit(PointwiseReward):
    """The probability of "Yes" to "does this figure show the prompt?", from one forward pass and no generation.

    With p the distribution of the first answer token over the whole vocabulary:

    - ``probability``: p(yes), in [0, 1]. VQAScore, Lin et al. (2024), arXiv:2404.01291, section 3.
    - ``renormalised``: p(yes) / (p(yes) + p(no)), in [0, 1]: the softmax over two answers' logits, as Q-Bench has it
      for "good" and "poor", Wu et al. (2023), arXiv:2309.14181.
    - ``logit``: log p(yes) - log p(no), the log-odds of the former. It has no bound and does not saturate, so a
      gradient is left where the other two have none; no paper of its own.

    Departure: VQAScore reads one token, "Yes". Here p(yes) is the sum over every token that is the word in any case and
    with or without white space ("Yes", "yes", " Yes"), because models and tokenizers differ in which of them they use.

    Args:
        judge: `LocalVLM` or `JudgeServer`.
        question: template; the default is VQAScore's for Qwen2.5-VL.
        score: which of the three.
        principle: a standard to judge by, put before the question.
        name: default: that of the judge.
    """

    words = ("yes", "no")

    def __init__(
        self,
        judge: Judge,
        question: str = YES_NO["vqascore-qwen"],
        *,
        score: YesScore = "probability",
        principle: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(judge, question, principle=principle, name=name)
        if score not in ("probability", "renormalised", "logit"):
            raise ValueError(f"score is {score!r}: use probability, renormalised or logit.")
        if score == "logit" and not judge.gives_probabilities:
            raise ValueError(
                "score is 'logit', and a judge that is read as text gives no probabilities: use probability."
            )
        self.score = score

    def read(self, log_probs: Tensor) -> Tensor:
        """Scores (B,) from log p(yes), log p(no) (B, 2)."""
        yes, no = log_probs.unbind(dim=1)
        if self.score == "probability":
            return yes.exp()
        return yes - no if self.score == "logit" else (yes - no).sigmoid()
