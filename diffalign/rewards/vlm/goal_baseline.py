"""VLM-RM: a dual encoder as a zero-shot reward, with what does not tell the goal from a baseline projected out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.rewards.clip import EncoderReward
from diffalign.rewards.encoders import DualEncoder


class GoalBaseline(EncoderReward):
    """r(s) = 1 - 1/2 ||alpha proj_L s + (1 - alpha) s - g||^2, in [-1, 1].

    Rocamonde et al. (2023), arXiv:2310.12921, "goal-baseline regularization": s and g are the unit embeddings of the
    image and of the goal, b that of a baseline which describes what is always there ("a humanoid robot"), L the line
    through b and g. alpha = 0 is the cosine of s and g; alpha = 1 keeps only how far s lies along L. Of several
    baselines b is the mean, not normalised again, as in the authors' code. That code runs under inference_mode; here
    gradients reach the image.

    Args:
        path: a folder or hub id, or an encoder.
        baseline: one description or several.
        alpha: strength of the regularisation, in [0, 1].
        goal: what is wanted; None: each image's own prompt.
        name: default: the last part of the path.
        **how: as for `load_encoder`.
    """

    def __init__(
        self,
        path: str | Path | DualEncoder,
        baseline: str | Sequence[str],
        *,
        alpha: float,
        goal: str | None = None,
        name: str | None = None,
        **how: Any,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}: it lies in [0, 1].")
        self.baseline = [baseline] if isinstance(baseline, str) else list(baseline)
        if not self.baseline:
            raise ValueError("baseline is empty: give one description of what is always there.")
        super().__init__(path, name=name, **how)
        self.alpha, self.goal = alpha, goal
        self.needs = () if goal is not None else ("prompt",)
        self.token_limit = self.encoder.token_limit

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """R (B,). ValueError where the goal is the baseline, since they span no line."""
        state = self.encoder.image_features(images)
        goal = self.encoder.text_features(prompts if self.goal is None else [self.goal] * len(prompts))
        direction = goal - self.encoder.text_features(self.baseline).mean(dim=0)
        length = direction.norm(dim=-1)
        if self.alpha > 0 and bool((length < 1e-6).any()):
            wanted = self.goal if self.goal is not None else prompts[int(length.argmin())]
            raise ValueError(f"the goal {wanted!r} and the baseline {self.baseline} have the same embedding.")
        away = state - goal
        # proj_L s - g = d (d . (s - g)) / |d|^2, so both parts of the distance are those of s - g along and across d.
        along = ((away * direction).sum(dim=-1) / length.clamp(min=1e-6)).square()
        across = away.square().sum(dim=-1) - along
        return 1 - (along + (1 - self.alpha) ** 2 * across) / 2
