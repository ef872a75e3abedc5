"""A rating from 1 to 5 as the expectation over the rating tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.rewards.vlm.judge import Judge, PointwiseReward
from diffalign.rewards.vlm.questions import RATING


class Rating(PointwiseReward):
    """sum_k k p(k) / sum_k p(k) over the answers k = 1 to 5, in [1, 5].

    The expectation over score tokens is G-Eval's, Liu et al. (2023), arXiv:2303.16634, eq. 1, taken from the logits of
    one forward pass as Q-Align does over its five rating words, Wu et al. (2023), arXiv:2312.17090; G-Eval estimates it
    from samples. It breaks the ties of the most likely digit, and has gradients.

    Args:
        judge: `LocalVLM` or `JudgeServer`.
        question: template that asks for a digit from 1 to 5.
        principle: a standard to judge by, put before the question.
        name: default: that of the judge.
    """

    words = ("1", "2", "3", "4", "5")

    def __init__(
        self, judge: Judge, question: str = RATING, *, principle: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(judge, question, principle=principle, name=name)

    def read(self, log_probs: Tensor) -> Tensor:
        """Expectations (B,) from (B, 5)."""
        levels = torch.arange(1, 6, dtype=log_probs.dtype, device=log_probs.device)
        return log_probs.softmax(dim=1) @ levels
