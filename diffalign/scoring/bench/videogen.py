"""VideoGen-RewardBench: pairs of videos, compared in three aspects and overall."""

from __future__ import annotations

import csv
from pathlib import Path

from diffalign.scoring.bench.files import check_size, media_root
from diffalign.scoring.bench.preferences import Pair, Preferences
from diffalign.scoring.items import one_line

ASPECTS = ("Overall", "VQ", "MQ", "TA")
_COLUMNS = ("path_A", "path_B", "prompt", *ASPECTS)
_LABELS = {"A": 1, "B": -1, "same": 0}


def read_videogen(folder: Path, images: Path | None) -> Preferences:
    """VideoGen-RewardBench (Liu et al., 2025, arXiv:2501.13918): A, B or same, for each of four questions."""
    file = folder / "videogen-rewardbench.csv"
    rows = _rows(file)
    root = media_root(folder, images, (".",), (row[key] for row in rows for key in ("path_A", "path_B")))
    preferences = Preferences(pairs={name: [] for name in ASPECTS}, unlabelled=dict.fromkeys(ASPECTS, 0))
    for record, row in enumerate(rows):
        prompt = row["prompt"]
        items = [preferences.add_file(root, row[key], prompt) for key in ("path_A", "path_B")]
        for name in ASPECTS:
            if row[name] in _LABELS:
                preferences.pairs[name].append(Pair(*items, _LABELS[row[name]], prompt, record))
            else:
                preferences.unlabelled[name] += 1
    return preferences


def _rows(file: Path) -> list[dict[str, str]]:
    check_size(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            rows = [] if missing else list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV: {one_line(error)}.") from None
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}: expected {', '.join(_COLUMNS)}.")
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{file}, entry {number}: has another number of cells than the header.")
    if not rows:
        raise ValueError(f"{file} has a header and no pair.")
    return rows
