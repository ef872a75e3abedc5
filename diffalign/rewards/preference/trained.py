"""What every trained head on an encoder shares: how it becomes a reward, and the files that it is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import yaml

from diffalign.rewards.clip import EncoderReward
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.preference.fit import Fitted
from diffalign.rewards.weights import find_weights


class TrainedHeadReward(EncoderReward):
    """A trained head on an encoder. Subclasses name the class of the head and write ``values``.

    Args:
        path: the encoder that the head was trained on: a folder or hub id, or the encoder itself.
        head: a head, or a safetensors file of one.
        name: default: the head's file name, or that of the class.
        **how: as for `load_encoder`.

    Attributes:
        kind: class of the head, with ``width``, ``read`` and ``save``.

    Raises:
        ValueError: the file holds no such head, or one for embeddings of another width.
    """

    kind: ClassVar[type]

    def __init__(self, path: str | Path | DualEncoder, head: Any, *, name: str | None = None, **how: Any) -> None:
        file = None if isinstance(head, self.kind) else find_weights(str(head))
        super().__init__(path, name=name or (file.stem if file else self.name), **how)
        self.head = (self.kind.read(file) if file else head).eval().requires_grad_(False)
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


def write_trained(
    folder: Path,
    name: str,
    fitted: Fitted,
    *,
    recipe_type: str,
    file_key: str,
    scale: str,
    kind: str,
    figures: Sequence[str],
    needs: Sequence[str],
    path: str,
    licence: str,
    source: str,
    summary: str = "",
) -> Path:
    """Writes ``NAME.safetensors`` and beside it the recipe ``NAME.yaml``, for `diffalign.rewards.load`.

    Args:
        folder: made if absent.
        name: of the reward.
        fitted: the head and its figures.
        recipe_type: as it is registered.
        file_key: the recipe's key for the file of the head.
        scale: what a difference of scores means.
        kind: of the head, in words.
        figures: of the validation that are told.
        needs: as for `Reward`.
        path: the encoder: zoo:NAME, a hub id, or a folder (relative to `folder`).
        licence: of the head.
        source: where the pairs came from.
        summary: one line for listings.

    Returns:
        The recipe's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fitted.head.save(folder / f"{name}.safetensors")
    size = sum(parameter.numel() for parameter in fitted.head.parameters())
    told = ", ".join(f"{key} {fitted.validation[key]:.3g}" for key in figures)
    recipe = {
        "name": name,
        "type": recipe_type,
        "path": path,
        file_key: f"{name}.safetensors",
        "scale": scale,
        "licence": licence,
        "source": f"{source}; {kind}, validation on {fitted.validation['pairs']} pairs: {told}",
        "size": f"{size:,} parameters, beside the encoder's",
        "needs": list(needs),
        "differentiable": True,
        "summary": summary,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False, width=120, allow_unicode=True), encoding="utf-8")
    return file
