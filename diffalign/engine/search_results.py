"""The folder of a search: what is finished of it stands on disk, and a search that ended early goes on from there."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from diffalign import media
from diffalign.config import write_resolved
from diffalign.engine.changes import changes
from diffalign.engine.output import DiskRefused
from diffalign.scoring.parts import write_whole

if TYPE_CHECKING:
    from diffalign.search_recipe import SearchRecipe

RESULTS, CONFIG = "results.jsonl", "config.yaml"
PLACES = ("output_dir",)
"""Settings that a search may be gone on with under other values."""


class Results:
    """Rows, images and traces of the prompts that are done, in the order of the prompts.

    The rows of prompts that were searched side by side are added together, after their images and traces; rows of a
    batch that is not whole are taken away, so that the same prompts are searched side by side again.

    Args:
        recipe: of the search; its folder is made.
        count: number of prompts.

    Attributes:
        rows: of the prompts that are done.

    Raises:
        ValueError: the folder holds a search by another recipe, told in words.
        DiskRefused: the disk is full or fails.
    """

    def __init__(self, recipe: SearchRecipe, count: int) -> None:
        self.folder = Path(recipe.output_dir)
        self._scratch = self.folder / ".unfinished"
        self._scratch.mkdir(parents=True, exist_ok=True)
        config = self.folder / CONFIG
        if config.exists():
            _same_recipe(recipe, config)
        else:
            write_whole(config, lambda path: write_resolved(recipe, path), self._scratch)
        self.rows = self._read(recipe.prompts_per_batch, count)

    def _read(self, batch: int, count: int) -> list[dict[str, Any]]:
        path = self.folder / RESULTS
        if not path.exists():
            return []
        rows = read_rows(self.folder)
        kept = rows if len(rows) == count else rows[: len(rows) - len(rows) % batch]
        text = _lines(kept)
        if text != path.read_bytes():
            write_whole(path, lambda out: out.write_bytes(text), self._scratch)
        return kept

    def image(self, name: str, image: Tensor) -> str:
        """Write an image (3, H, W) and return its place in the folder."""
        return self._write(f"images/{name}.png", lambda path: media.save_png(image, path))

    def trace(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors and return their place in the folder."""
        own = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # columns of tables are not
        return self._write(f"traces/{name}.safetensors", lambda path: save_file(own, path))

    def _write(self, place: str, write: Any) -> str:
        path = self.folder / place
        path.parent.mkdir(exist_ok=True)
        write_whole(path, write, self._scratch)
        return place

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of prompts whose images and traces are written; they are on disk when this returns."""
        told = [finite(row) for row in rows]
        try:
            with (self.folder / RESULTS).open("ab") as file:
                file.write(_lines(told))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskRefused(
                f"{self.folder / RESULTS} could not be written ({error}); with room there, the same command goes on "
                "where it stopped"
            ) from error
        self.rows += told

    def close(self) -> None:
        """Remove what a killed process may have left half written."""
        shutil.rmtree(self._scratch)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a search's folder; a last line that a crash cut off is left out."""
    lines = (folder / RESULTS).read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def finite(tree: Any) -> Any:
    """A tree for JSON: numbers that are not finite become null."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _same_recipe(recipe: SearchRecipe, config: Path) -> None:
    """Raise ValueError unless the folder's recipe, and the files that it names, are these."""
    told = changes(recipe, config, PLACES)
    if told:
        raise ValueError(
            f"{config.parent} holds another search: {'; '.join(told[:5])}; choose another output_dir, or remove it"
        )
