"""The rows of a run as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.scoring.bench.datasets import Dataset
from diffalign.scoring.parts import write_whole
from diffalign.scoring.table import write_table

if TYPE_CHECKING:
    from diffalign.scoring.bench.run import Row


def write_rows(
    path: Path, dataset: Dataset, folder: Path, rows: Sequence[Row], unlabelled: Mapping[str, int], scratch: Path
) -> None:
    """Writes JSON or CSV by the suffix; what is not known is null or an empty cell.

    Args:
        path: the file.
        dataset: the set.
        folder: its copy.
        rows: for each reward and each set of labels.
        unlabelled: name of the labels -> entries without one.
        scratch: a folder on the same disk.
    """
    table = [{"dataset": dataset.name, **_flat(row), "unlabelled": unlabelled[row.labels]} for row in rows]
    if path.suffix == ".csv":
        write_table({key: [row[key] for row in table] for key in table[0]}, path, scratch)
        return
    page = {"dataset": dataset.name, "folder": str(folder), "protocol": dataset.protocol, "rows": table}
    text = json.dumps(page, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), scratch)


def _flat(row: Row) -> dict[str, Any]:
    cells = {"reward": row.reward, "labels": row.labels, **asdict(row.agreement), "published": row.published}
    return {key: None if isinstance(cell, float) and not math.isfinite(cell) else cell for key, cell in cells.items()}
