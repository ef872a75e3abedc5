"""A trained PAL model as a reward, and the files that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.pal.model import PalModel
from diffalign.rewards.preference import Fitted
from diffalign.rewards.preference.trained import TrainedHeadReward, write_trained


class PalReward(TrainedHeadReward):
    """What the user of each sample thinks of it, by a `PalModel` on an encoder, in nats.

    A difference d between samples of one prompt and one user means preferred with probability sigmoid(d). Who the user
    is stands in ``metadata["user"]``; the score of a sample whose user is not known has failed. Its arguments are those
    of `TrainedHeadReward`.
    """

    kind = PalModel
    name = "pal"
    needs = ("user",)

    def __init__(
        self, path: str | Path | DualEncoder, head: str | Path | PalModel, *, name: str | None = None, **how: Any
    ) -> None:
        super().__init__(path, head, name=name, **how)
        if self.head.variant == "B":
            self.needs = ("prompt", "user")
            self.token_limit = self.encoder.token_limit

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards (B,) in nats. ValueError: a sample has no user, or one that is not known."""
        if any("user" not in entry for entry in metadata):
            raise ValueError('a sample has no metadata["user"]: say whose taste it is scored by')
        mixture = self.head.mixtures([str(entry["user"]) for entry in metadata])
        text = self.encoder.text_features(prompts) if self.head.variant == "B" else None
        return self.head(self.encoder.image_features(images), text, mixture)


def write_pal(folder: Path, name: str, fitted: Fitted[PalModel], **about: str) -> Path:
    """Writes what `fit_pal` returned as ``NAME.safetensors`` and the recipe ``NAME.yaml``; returns its path.

    Args:
        folder: made if absent.
        name: of the reward.
        fitted: the model and its figures, perhaps with users added to the model.
        **about: path, licence, source and summary, as for `write_trained`.
    """
    model = fitted.head
    return write_trained(
        folder,
        name,
        fitted,
        recipe_type="pal",
        file_key="weights",
        scale="nats; for one prompt and user a difference d means preferred with probability sigmoid(d)",
        kind=f"variant {model.variant}, {model.logits.shape[1]} prototypes, {len(model.users)} users",
        figures=("accuracy", "nll"),
        needs=("prompt", "user") if model.variant == "B" else ("user",),
        **about,
    )
