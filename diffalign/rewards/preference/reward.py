"""A trained preference head as a reward, and the files that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.preference.fit import Fitted
from diffalign.rewards.preference.head import PreferenceHead
from diffalign.rewards.preference.trained import TrainedHeadReward, write_trained


class PreferenceReward(TrainedHeadReward):
    """A `PreferenceHead` on an encoder, in nats: a difference d means preferred with probability sigmoid(d).

    Only differences between samples of one prompt mean anything. A head that learned the "gaussian" likelihood states
    its standard deviation as the score's ``sigma``. Its arguments are those of `TrainedHeadReward`.
    """

    kind = PreferenceHead
    name = "preference"

    def __init__(
        self, path: str | Path | DualEncoder, head: str | Path | PreferenceHead, *, name: str | None = None, **how: Any
    ) -> None:
        super().__init__(path, head, name=name, **how)
        self.token_limit = self.encoder.token_limit
        self.states_sigma = self.head.likelihood == "gaussian"

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards (B,) in nats; (B, 2), beside their standard deviations, where the head states them."""
        reward, log_variance = self.head(self.encoder.image_features(images), self.encoder.text_features(prompts))
        return reward if log_variance is None else torch.stack([reward, (log_variance / 2).exp()], dim=1)


def write_reward(folder: Path, name: str, fitted: Fitted[PreferenceHead], **about: str) -> Path:
    """Writes what `fit_preference` returned as ``NAME.safetensors`` and the recipe ``NAME.yaml``; returns its path.

    Args:
        folder: made if absent.
        name: of the reward.
        fitted: the head and its figures.
        **about: path, licence, source and summary, as for `write_trained`.
    """
    return write_trained(
        folder,
        name,
        fitted,
        recipe_type="preference",
        file_key="head",
        scale="nats; within a prompt a difference d means preferred with probability sigmoid(d)",
        kind=fitted.head.likelihood,
        figures=("accuracy", "nll", "calibration_error"),
        needs=("prompt",),
        **about,
    )
