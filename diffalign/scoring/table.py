"""The one file that a run ends in: a row for each item, in the order of the inputs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.scoring.items import Item
from diffalign.scoring.parts import write_whole

_MAX_METADATA_COLUMNS = 100

Columns = dict[str, list[Any]]
"""Column name -> its cells; None where there is nothing."""


def columns_of(items: Sequence[Item], scores: Mapping[str, tuple[list[float | None], list[str | None]]]) -> Columns:
    """`path`, `prompt`, the metadata, and of each reward its score and `NAME_reason`, why there is none.

    Metadata of the name of another column is left out; of more than 100 names it all is one column of JSON.
    """
    columns: Columns = {"path": [item.name for item in items], "prompt": _one_type([item.prompt for item in items])}
    own = {name: column for reward, pair in scores.items() for name, column in zip(_named(reward), pair, strict=True)}
    names = dict.fromkeys(name for item in items for name in item.metadata if name not in columns | own)
    if len(names) > _MAX_METADATA_COLUMNS:
        columns["metadata"] = [_json(item.metadata) if item.metadata else None for item in items]
    else:
        columns |= {name: _one_type([item.metadata.get(name) for item in items]) for name in names}
    return columns | own


def _named(reward: str) -> tuple[str, str]:
    return reward, f"{reward}_reason"


def _one_type(cells: list[Any]) -> list[Any]:
    """Cells of one type that every format has; JSON text where they differ, or are lists or objects."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int} and any(cell is not None and abs(cell) >= 2**63 for cell in cells):
        kinds = {object}
    if kinds == {int, float}:
        return [None if cell is None else float(cell) for cell in cells]
    if len(kinds) <= 1 and kinds <= {bool, int, float}:
        return cells
    return [None if cell is None else _text(cell) if isinstance(cell, str) else _json(cell) for cell in cells]


def _text(cell: str) -> str:
    return cell.encode("utf-8", "backslashreplace").decode()  # JSON can say halves of characters, which no file holds


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, default=str)


def write_table(columns: Columns, path: Path, scratch: Path) -> None:
    """Writes parquet, CSV or JSONL by the suffix; the same columns give the same bytes."""
    writer = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[path.suffix]
    write_whole(path, lambda temporary: writer(columns, temporary), scratch)


def _write_parquet(columns: Columns, path: Path) -> None:
    arrays = {name: pa.array(cells, pa.string() if _empty(cells) else None) for name, cells in columns.items()}
    pq.write_table(pa.table(arrays), path)


def _empty(cells: Iterable[Any]) -> bool:
    return all(cell is None for cell in cells)


def _write_csv(columns: Columns, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_jsonl(columns: Columns, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in zip(*columns.values(), strict=True):
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")


def best(columns: Columns, reward: str, keep: float, per: str | None) -> Columns:
    """The rows with the highest scores: of each group's n scored rows the best ceil(keep n), in the order of the input.

    Compress & Align keeps the tenth of a collection of captioned images that its reward puts first. Departure: within
    each group, so that a hard prompt is not left without any. Of equal scores the earlier row is kept.

    Args:
        columns: the whole table.
        reward: the column that ranks.
        keep: the share, above 0 and at most 1.
        per: the column that says the group; None: all rows are one.
    """
    groups: dict[Any, list[int]] = {}
    for row, value in enumerate(columns[reward]):
        if value is not None:
            groups.setdefault(columns[per][row] if per else None, []).append(row)
    share = Fraction(str(keep))  # 0.1 means a tenth, not the float that lies above it
    kept = set()
    for rows in groups.values():
        ranked = sorted(rows, key=lambda row: -columns[reward][row])
        kept.update(ranked[: math.ceil(share * len(rows))])
    return {name: [cells[row] for row in sorted(kept)] for name, cells in columns.items()}
