"""HPDv3: pairs of image files, the better one first."""

from __future__ import annotations

from pathlib import Path

from diffalign.scoring.bench.files import json_rows, media_root, text_of
from diffalign.scoring.bench.preferences import LABELS, Pair, Preferences


def read_hpdv3(folder: Path, images: Path | None) -> Preferences:
    """The test split of HPDv3 (Ma et al., 2025, arXiv:2508.03789): `path1` is preferred to `path2`."""
    file = folder / "test.json"
    keys = ("prompt", "path1", "path2")
    rows = [[text_of(row, key, file, number) for key in keys] for number, row in enumerate(json_rows(file))]
    root = media_root(folder, images, (".", "images"), (name for _, *names in rows for name in names))
    preferences = Preferences(pairs={LABELS: []}, unlabelled={LABELS: 0})
    for record, (prompt, better, worse) in enumerate(rows):
        items = [preferences.add_file(root, name, prompt) for name in (better, worse)]
        preferences.pairs[LABELS].append(Pair(*items, 1, prompt, record))
    return preferences
