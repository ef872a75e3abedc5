"""What the denoiser is told about each row's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded prompts, row by row.

    Attributes:
        tensors: named tensors (B, ...), under the names of the pipeline's own arguments.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def rows(self, index: slice | Tensor | Sequence[int]) -> "Condition":
        """Select rows."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch_size: int) -> "Condition":
        """Repeat a condition of one row for a batch, without a copy."""
        return Condition({k: t.expand(batch_size, *[-1] * (t.ndim - 1)) for k, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> "Condition":
        """Move every tensor."""
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Join the rows of conditions of one family.

        Prompts of fewer tokens get zeros at their end, in embeddings and mask alike, as a pipeline pads a batch.
        """
        names = conditions[0].tensors
        return Condition({name: torch.cat(_pad([c.tensors[name] for c in conditions])) for name in names})


def _pad(tensors: list[Tensor]) -> list[Tensor]:
    """Pad (B, tokens, ...) tensors to the most tokens; those of one shape are returned as they are."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
