"""A trained PAL model as a reward, and the files that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import Tensor

from diffalign.rewards.clip import EncoderReward
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.pal.fit import FittedPal
from diffalign.rewards.pal.model import PalModel
from diffalign.rewards.weights import find_weights


class PalReward(EncoderReward):
    """What the user of each sample thinks of it, by a `PalModel` on an encoder, in nats.

    A difference d between samples of one prompt and one user means preferred with probability sigmoid(d). Who the user
    is stands in ``metadata["user"]``; the score of a sample whose user is not known has failed.

    Args:
        path: the encoder that the model was trained on: a folder or hub id, or the encoder itself.
        model: a model, or a safetensors file of one.
        name: default: the model's file name.
        **how: as for `load_encoder`.

    Raises:
        ValueError: the file holds no such model, or one for embeddings of another width.
    """

    def __init__(
        self, path: str | Path | DualEncoder, model: str | Path | PalModel, *, name: str | None = None, **how: Any
    ) -> None:
        file = None if isinstance(model, PalModel) else find_weights(str(model))
        super().__init__(path, name=name or (file.stem if file else "pal"), **how)
        self.model = (PalModel.read(file) if file else model).eval().requires_grad_(False)
        self.needs = ("prompt", "user") if self.model.variant == "B" else ("user",)
        self.token_limit = self.encoder.token_limit if self.model.variant == "B" else None
        if self.model.width != self.encoder.image_width:
            raise ValueError(
                f"{file or 'the model'} reads embeddings of {self.model.width} numbers, and {self.encoder.label} makes "
                f"{self.encoder.image_width}: take the encoder that it was trained on"
            )
        self.to(self.encoder.device)

    def to(self, device: torch.device | str) -> Self:
        """Moves model and encoder."""
        self.model.to(device)
        return super().to(device)

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards (B,) in nats. ValueError: a sample has no user, or one that is not known."""
        if any("user" not in entry for entry in metadata):
            raise ValueError('a sample has no metadata["user"]: say whose taste it is scored by')
        mixture = self.model.mixtures([str(entry["user"]) for entry in metadata])
        text = self.encoder.text_features(prompts) if self.model.variant == "B" else None
        return self.model(self.encoder.image_features(images), text, mixture)


def write_pal(
    folder: Path, name: str, fitted: FittedPal, *, path: str, licence: str, source: str, summary: str = ""
) -> Path:
    """Writes ``NAME.safetensors`` and beside it the recipe ``NAME.yaml``, for `diffalign.rewards.load`.

    Args:
        folder: made if absent.
        name: of the reward.
        fitted: what `fit_pal` returned, perhaps with users added to its model.
        path: the encoder: zoo:NAME, a hub id, or a folder (relative to `folder`).
        licence: of the model.
        source: where the pairs came from.
        summary: one line for listings.

    Returns:
        The recipe's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = fitted.model
    model.save(folder / f"{name}.safetensors")
    figures = ", ".join(f"{key} {fitted.validation[key]:.3g}" for key in ("accuracy", "nll"))
    kind = f"variant {model.variant}, {model.logits.shape[1]} prototypes, {len(model.users)} users"
    recipe = {
        "name": name,
        "type": "pal",
        "path": path,
        "weights": f"{name}.safetensors",
        "scale": "nats; for one prompt and user a difference d means preferred with probability sigmoid(d)",
        "licence": licence,
        "source": f"{source}; {kind}, validation on {fitted.validation['pairs']} pairs: {figures}",
        "size": f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, beside the encoder's",
        "needs": ["prompt", "user"] if model.variant == "B" else ["user"],
        "differentiable": True,
        "summary": summary,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False, width=120, allow_unicode=True), encoding="utf-8")
    return file
