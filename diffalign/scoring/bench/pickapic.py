"""Pick-a-Pic: parquet files with two encoded images a row, and who of them won."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.scoring.bench.preferences import LABELS, Pair, Preferences
from diffalign.scoring.items import Item, one_line, printable, stamp_of
from diffalign.scoring.lists import holds_bytes

_WORDS = ("caption", "label_0", "label_1")
_PIXELS = ("jpg_0", "jpg_1")
_LABELS = {(1.0, 0.0): 1, (0.0, 1.0): -1, (0.5, 0.5): 0}


def read_pickapic(folder: Path, images: Path | None) -> Preferences:
    """`test_unique` of Pick-a-Pic v1 or v2 (Kirstain et al., 2023, arXiv:2305.01569), and `validation_unique` if there.

    The images are cells of the files, so `images` is refused.
    """
    if images is not None:
        raise ValueError(f"--images {images}: the images of Pick-a-Pic are in its parquet files, so leave it out.")
    preferences = Preferences(unlabelled={LABELS: 0})
    preferences.pairs[LABELS] = _read(parquet_files(folder, "test_unique"), preferences)
    unlabelled = dict(preferences.unlabelled)
    preferences.validation = _read(parquet_files(folder, "validation_unique"), preferences)
    preferences.unlabelled = unlabelled  # those of the test split
    return preferences


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the folder or in its `data`, as `datasets` names them: SPLIT-00000-of-00001-HASH."""
    return sorted(file for place in (folder / "data", folder) for file in place.glob(f"{split}-*.parquet"))


def _read(files: list[Path], preferences: Preferences) -> list[Pair]:
    pairs: list[Pair] = []
    for file in files:
        rows = _rows(file)
        labels = [_LABELS.get((row["label_0"], row["label_1"])) if row.get("has_label", True) else None for row in rows]
        labelled = [number for number, label in enumerate(labels) if label is not None]
        preferences.unlabelled[LABELS] += len(rows) - len(labelled)
        first, stamp = len(preferences.items), stamp_of(file)
        for column in _PIXELS:  # one after the other: in this order cells are read forward
            for number in labelled:
                name = f"{printable(file)}/{number}/{column}"
                preferences.items.append(Item(name, file, rows[number]["caption"], cell=(column, number), stamp=stamp))
        for place, number in enumerate(labelled, first):
            pairs.append(Pair(place, place + len(labelled), labels[number], rows[number]["caption"], len(pairs)))
    return pairs


def _rows(file: Path) -> list[dict[str, Any]]:
    """The words of each row; what the file lacks is refused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            names = [name for name in (*_WORDS, "has_label") if name in schema.names]
            rows = opened.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {one_line(error)}.") from None
    missing = [name for name in (*_WORDS, *_PIXELS) if name not in schema.names]
    missing += [
        f"{name} of bytes" for name in _PIXELS if name not in missing and not holds_bytes(schema.field(name).type)
    ]
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}: expected {', '.join((*_WORDS, *_PIXELS))}.")
    if not all(isinstance(row["caption"], str) for row in rows):
        raise ValueError(f"{file}: every caption must be a text.")
    return rows
