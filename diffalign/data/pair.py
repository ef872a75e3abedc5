"""A preference pair: two images of a prompt, of which one was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from diffalign.data.picture import open_fitted
from diffalign.data.prompts import Prompt

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, not opened yet.

    Attributes:
        prompt: its id is the address of the pair: the row of the file, counted from 0, or what the file says.
        chosen: a file, or an encoded image.
        rejected: likewise.
        source: where the pair stands, for messages.
    """

    prompt: Prompt
    chosen: Path | bytes
    rejected: Path | bytes
    source: str


def open_side(pair: Pair, side: Side, size: tuple[int, int]) -> Tensor:
    """One image of a pair, (3, H, W) in [0, 1] with `size` = (H, W), fitted as by `open_fitted`.

    Raises:
        ValueError: the image cannot be opened; the message says where it stands.
    """
    try:
        return open_fitted(getattr(pair, side), size)
    except ValueError as error:
        raise ValueError(f"{pair.source}: the {side} image {error} Mend it, or take the row out.") from None
