"""LAION's aesthetic predictors: a small head on CLIP's image embedding, which reads no prompt.

Schuhmann et al. (2022), arXiv:2210.08402, section 3.1 and appendix; v1: LAION-AI/aesthetic-predictor, one linear layer;
v2: christophschuhmann/improved-aesthetic-predictor, five linear layers without activations between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.rewards.clip import EncoderReward
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.weights import find_weights, read_weights


class AestheticReward(EncoderReward):
    """An affine map of the unit embedding; about 1 to 10, and 4 to 7 for most pictures.

    Five linear layers without activations (dropout does nothing in evaluation) are one, multiplied out in float64.

    Args:
        path: the CLIP, openai/clip-vit-large-patch14 for both published heads, or an encoder.
        head: file of the head in either published layout (``weight`` and ``bias``, or ``layers.N.weight`` and
            ``layers.N.bias``), safetensors or torch.
        name: default: the head's file name.
        **how: as for `load_encoder`.

    Raises:
        ValueError: the file holds no such head, or one for embeddings of another width.
    """

    needs = ()

    def __init__(
        self, path: str | Path | DualEncoder, head: str | Path, *, name: str | None = None, **how: Any
    ) -> None:
        file = find_weights(str(head))
        super().__init__(path, name=name or file.stem, **how)
        weight, bias = folded(read_weights(file), str(file))
        width = self.encoder.image_width
        if len(weight) != width:
            made = f"{self.encoder.label} makes {width}"
            raise ValueError(f"{file} reads embeddings of {len(weight)} numbers, and {made}")
        self.weight, self.bias = weight.to(self.encoder.device), bias.to(self.encoder.device)

    def to(self, device: torch.device | str) -> Self:
        """Moves head and encoder."""
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        return super().to(device)

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,)."""
        return self.encoder.image_features(images) @ self.weight + self.bias


def folded(weights: dict[str, Tensor], place: str) -> tuple[Tensor, Tensor]:
    """(weight (D,), bias ()) of linear layers that follow one another in the order of their numbers, float32.

    Raises:
        ValueError: these are not such layers, or not onto one number.
    """
    names = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    layers = sorted(names, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    if not layers or set(weights) != {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}:
        raise ValueError(f"{place} is no stack of linear layers: it holds {', '.join(sorted(weights)[:4])}")
    matrix, offset = None, None
    for layer in layers:
        weight, bias = weights[f"{layer}weight"].double(), weights[f"{layer}bias"].double()
        if matrix is not None and weight.shape[-1] != len(matrix):
            raise ValueError(f"{place}: {layer}weight reads {weight.shape[-1]} numbers and gets {len(matrix)}")
        matrix = weight if matrix is None else weight @ matrix
        offset = bias if offset is None else weight @ offset + bias
    if len(matrix) != 1:
        raise ValueError(f"{place} gives {len(matrix)} numbers, and a score is one")
    return matrix[0].float(), offset[0].float()
