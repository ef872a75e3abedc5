"""ImageRewardDB and HPDv2: several images of a prompt in the order that people gave them."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.scoring.bench.files import is_text, json_rows, media_root, text_of
from diffalign.scoring.bench.preferences import LABELS, Pair, Preferences, comparison


def read_imagereward(folder: Path, images: Path | None) -> Preferences:
    """The test split of ImageRewardDB (Xu et al., 2023, arXiv:2304.05977): `generations` and their `ranking`."""
    return _read(folder / "test.json", images, "generations", "ranking", ("test_images", "."))


def read_hpdv2(folder: Path, images: Path | None) -> Preferences:
    """The test split of HPDv2 (Wu et al., 2023, arXiv:2306.09341): `image_path` and their mean `rank`."""
    return _read(folder / "test.json", images, "image_path", "rank", ("test", "."))


def _read(file: Path, images: Path | None, names_key: str, ranks_key: str, places: tuple[str, ...]) -> Preferences:
    rows = json_rows(file)
    found = [_entry(row, names_key, ranks_key, file, number) for number, row in enumerate(rows)]
    root = media_root(file.parent, images, places, (name for _, names, _ in found for name in names))
    preferences = Preferences(pairs={LABELS: []}, unlabelled={LABELS: 0})
    for record, (prompt, names, ranks) in enumerate(found):
        items = [preferences.add_file(root, name, prompt) for name in names]
        for i, j in combinations(range(len(items)), 2):
            label = comparison(ranks[j], ranks[i])  # rank 1 is the best
            preferences.pairs[LABELS].append(Pair(items[i], items[j], label, prompt, record))
    return preferences


def _entry(
    row: dict[str, Any], names_key: str, ranks_key: str, file: Path, number: int
) -> tuple[str, list[str], list[float]]:
    prompt, names, ranks = text_of(row, "prompt", file, number), row.get(names_key), row.get(ranks_key)
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise ValueError(f"{file}, entry {number}: {names_key} must be a list of file names.")
    if not isinstance(ranks, list) or not all(map(_is_rank, ranks)) or len(ranks) != len(names):
        raise ValueError(f"{file}, entry {number}: {ranks_key} must be a list with a number for each of {names_key}.")
    return prompt, names, ranks


def _is_rank(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
