"""A trained preference head as a reward, and the files that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import Tensor

from diffalign.rewards.clip import EncoderReward
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.preference.fit import Fitted
from diffalign.rewards.preference.head import PreferenceHead
from diffalign.rewards.weights import find_weights


class PreferenceReward(EncoderReward):
    """A `PreferenceHead` on an encoder, in nats: a difference d means preferred with probability sigmoid(d).

    Only differences between samples of one prompt mean anything. A head that learned the "gaussian" likelihood states
    its standard deviation as the score's ``sigma``.

    Args:
        path: the encoder that the head was trained on: a folder or hub id, or the encoder itself.
        head: a head, or a safetensors file of one.
        name: default: the head's file name.
        **how: as for `load_encoder`.

    Raises:
        ValueError: the file holds no such head, or one for embeddings of another width.
    """

    def __init__(
        self, path: str | Path | DualEncoder, head: str | Path | PreferenceHead, *, name: str | None = None, **how: Any
    ) -> None:
        file = None if isinstance(head, PreferenceHead) else find_weights(str(head))
        super().__init__(path, name=name or (file.stem if file else "preference"), **how)
        self.head = (PreferenceHead.read(file) if file else head).eval().requires_grad_(False)
        self.token_limit = self.encoder.token_limit
        self.states_sigma = self.head.likelihood == "gaussian"
        if self.head.width != self.encoder.image_width:
            raise ValueError(
                f"{file or 'the head'} reads embeddings of {self.head.width} numbers, and {self.encoder.label} makes "
                f"{self.encoder.image_width}: take the encoder that it was trained on"
            )
        self.to(self.encoder.device)

    def to(self, device: torch.device | str) -> Self:
        """Moves head and encoder."""
        self.head.to(device)
        return super().to(device)

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards (B,) in nats; (B, 2), beside their standard deviations, where the head states them."""
        reward, log_variance = self.outputs(images, prompts)
        return reward if log_variance is None else torch.stack([reward, (log_variance / 2).exp()], dim=1)

    def outputs(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """The head's rewards (B,), and log-variances (B,) or None."""
        return self.head(self.encoder.image_features(images), self.encoder.text_features(prompts))


def write_reward(
    folder: Path, name: str, fitted: Fitted, *, path: str, licence: str, source: str, summary: str = ""
) -> Path:
    """Writes ``NAME.safetensors`` and beside it the recipe ``NAME.yaml``, for `diffalign.rewards.load`.

    Args:
        folder: made if absent.
        name: of the reward.
        fitted: what `fit_preference` returned.
        path: the encoder: zoo:NAME, a hub id, or a folder (relative to `folder`).
        licence: of the head.
        source: where the pairs came from.
        summary: one line for listings.

    Returns:
        The recipe's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fitted.head.save(folder / f"{name}.safetensors")
    figures = ", ".join(f"{key} {fitted.validation[key]:.3g}" for key in ("accuracy", "nll", "calibration_error"))
    size = sum(parameter.numel() for parameter in fitted.head.parameters())
    recipe = {
        "name": name,
        "type": "preference",
        "path": path,
        "head": f"{name}.safetensors",
        "scale": "nats; within a prompt a difference d means preferred with probability sigmoid(d)",
        "licence": licence,
        "source": f"{source}; {fitted.head.likelihood}, validation on {fitted.validation['pairs']} pairs: {figures}",
        "size": f"{size:,} parameters, beside the encoder's",
        "needs": ["prompt"],
        "differentiable": True,
        "summary": summary,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False, width=120, allow_unicode=True), encoding="utf-8")
    return file
