"""What of a run is done: `OUT.parts/`, a folder that is only added to, so that a run may end at any moment.

A part holds the scores of `ROWS` items that follow each other, or of all items of some prompts where a reward compares
them. It gets its name when it is whole, and what has its name and cannot be read, or holds other rows, is scored again.
`plan.json` says what the parts are parts of.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.engine.output import DiskRefused
from diffalign.scoring.batches import Scored
from diffalign.scoring.items import Item

logger = logging.getLogger(__name__)

ROWS = 128


class Parts:
    """The parts of one run.

    Args:
        folder: `OUT.parts`.
        items: all that is scored, in order.
        fingerprints: of each reward, by name.
        grouped: whether the items of a prompt stay together, one prompt after another.

    Attributes:
        chunks: the indices of the items of each part.

    Raises:
        ValueError: the folder holds parts of something else, told in words; or it cannot be made.
    """

    def __init__(
        self, folder: Path, items: Sequence[Item], fingerprints: Mapping[str, str], grouped: bool = False
    ) -> None:
        self.folder = folder
        self.names = list(fingerprints)
        starts = range(0, len(items), ROWS)
        chunks = [range(start, min(start + ROWS, len(items))) for start in starts]
        self.chunks: Sequence[Sequence[int]] = _whole_groups(items) if grouped else chunks
        columns = {"name": [item.name for item in items], "digest": [item.digest for item in items]}
        whole = sha256("".join(columns["digest"]).encode()).hexdigest()
        plan = {"inputs": whole, "items": len(items), "rows": ROWS, "rewards": dict(fingerprints)}
        self._claim(plan, columns)

    def done(self, chunk: int) -> bool:
        """Whether a part is there and whole; one that is not is removed."""
        path = self._path(chunk)
        if not path.exists():
            return False
        try:
            self._read(chunk)
        except (OSError, ValueError, KeyError) as error:  # Arrow's errors are ValueErrors or OSErrors
            logger.warning("%s is not whole (%s); its rows are scored again", path, error)
            path.unlink(missing_ok=True)
            return False
        return True

    def missing(self) -> int:
        """How many parts are not there yet."""
        return sum(not self._path(chunk).exists() for chunk in range(len(self.chunks)))

    def write(self, chunk: int, scored: Mapping[int, Scored]) -> None:
        """Puts a part in its place."""
        columns: dict[str, pa.Array] = {"index": pa.array(self.chunks[chunk], pa.int64())}
        for name in self.names:
            answers = [scored[index][name] for index in self.chunks[chunk]]
            columns[f"value/{name}"] = pa.array([x if isinstance(x, float) else None for x in answers], pa.float64())
            columns[f"reason/{name}"] = pa.array([x if isinstance(x, str) else None for x in answers], pa.string())
        write_whole(self._path(chunk), lambda path: pq.write_table(pa.table(columns), path, write_page_checksum=True))

    def scores(self) -> dict[str, tuple[list[float | None], list[str | None]]]:
        """Reward name -> (values, reasons) of all items in order."""
        tables = [self._read(chunk) for chunk in range(len(self.chunks))]
        whole = pa.concat_tables(tables).sort_by("index")
        return {name: (whole[f"value/{name}"].to_pylist(), whole[f"reason/{name}"].to_pylist()) for name in self.names}

    def _path(self, chunk: int) -> Path:
        return self.folder / f"part-{chunk:07d}.parquet"

    def _read(self, chunk: int) -> pa.Table:
        table = pq.read_table(self._path(chunk), page_checksum_verification=True)
        if table["index"].to_pylist() != list(self.chunks[chunk]):
            raise ValueError("it holds other rows")
        return table

    def _claim(self, plan: dict[str, Any], columns: dict[str, list[str]]) -> None:
        """Writes the plan, or compares it with the one that is there."""
        file, listing = self.folder / "plan.json", self.folder / "inputs.parquet"
        if not file.exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self.folder} cannot be made ({error.strerror}): choose another --out.") from error
            write_whole(listing, lambda path: pq.write_table(pa.table(columns), path))
            write_whole(file, lambda path: path.write_text(json.dumps(plan, indent=2), encoding="utf-8"))
        there = json.loads(file.read_text(encoding="utf-8"))
        if there == plan:
            return
        before = pq.read_table(listing)
        told = [
            *_changed_items(dict(zip(*(before[key].to_pylist() for key in columns), strict=True)), columns),
            *_changed_rewards(there["rewards"], plan["rewards"]),
        ]
        raise ValueError(
            f"{self.folder} belongs to another run: {'; '.join(told) or 'it was written by another version'}. Choose "
            "another --out, or remove that folder to score everything again."
        )


def _whole_groups(items: Sequence[Item]) -> list[list[int]]:
    """Prompts in their order, so many to a part that it has at most `ROWS` items, or a single prompt."""
    groups: dict[str | int, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(index if item.prompt is None else item.prompt, []).append(index)
    chunks: list[list[int]] = []
    for group in groups.values():
        if not chunks or len(chunks[-1]) + len(group) > ROWS:
            chunks.append([])
        chunks[-1] += group
    return chunks


def _changed_items(before: dict[str, str], now: Mapping[str, Sequence[str]]) -> list[str]:
    present = dict(zip(now["name"], now["digest"], strict=True))
    found = {
        "new": [name for name in present if name not in before],
        "gone": [name for name in before if name not in present],
        "changed": [name for name, digest in present.items() if before.get(name, digest) != digest],
    }
    told = [
        f"{len(names):,} {'inputs are' if len(names) > 1 else 'input is'} {what}, such as {names[0]}"
        for what, names in found.items()
        if names
    ]
    return told or ([] if list(present.items()) == list(before.items()) else ["the inputs have another order"])


def _changed_rewards(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    told = []
    if list(before) != list(now):
        told.append(f"its rewards are {', '.join(before)}, not {', '.join(now)}")
    told += [
        f"reward {name} has another recipe, code or weights" for name in now if before.get(name, now[name]) != now[name]
    ]
    return told


def write_whole(path: Path, write: Callable[[Path], Any], scratch: Path | None = None) -> None:
    """Has a file written under another name, synced and renamed: what has the name is whole.

    Args:
        path: the file.
        write: writes it at the path that it is given.
        scratch: the folder, on the same disk, where a killed process may leave half a file; default: that of `path`.

    Raises:
        DiskRefused: the disk is full or refuses.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiskRefused(
            f"{path} could not be written ({error}); with room there, the same command goes on where it stopped"
        ) from error
