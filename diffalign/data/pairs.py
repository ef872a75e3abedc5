"""Preference pairs: two images of a prompt, of which one was chosen, read from files and written to them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign import media
from diffalign.data.prompts import Prompt

LABELS = ("label_0", "label_1")
PICTURES = ("jpg_0", "jpg_1")
COLUMNS = ("caption", *PICTURES, *LABELS)
"""Those of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): a prompt, two encoded images, 1 and 0, or 0.5 twice."""

MAX_PARQUET_BYTES = 8 * 2**30  # encoded images of a parquet file are held in main memory
_ROW_GROUP = 64  # rows that are written together
_WINNER = {(1.0, 0.0): 0, (0.0, 1.0): 1}
_TIE = (0.5, 0.5)


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, not opened yet.

    Attributes:
        prompt: its id is the address of the pair: the row of the file, counted from 0, or its key ``id`` in a JSONL.
        chosen: a file, or an encoded image.
        rejected: likewise.
        source: where the pair stands, for messages.
    """

    prompt: Prompt
    chosen: Path | bytes
    rejected: Path | bytes
    source: str


@dataclass(frozen=True)
class Judged:
    """A row to write: two images of a prompt in the order in which they were drawn, and their scores, which differ.

    Attributes:
        prompt: what both show.
        images: (2, 3, H, W) 8-bit.
        rewards: of the two; the higher one is chosen.
    """

    prompt: Prompt
    images: Tensor
    rewards: tuple[float, float]


def read_pairs(path: str | Path) -> tuple[list[Pair], int]:
    """Reads a ``.parquet`` in Pick-a-Pic's columns, or a ``.jsonl`` beside image files.

    A line of a JSONL is an object with ``prompt``, the paths ``chosen`` and ``rejected``, which start from the folder
    of the file, and any metadata. In a parquet file images are bytes, or structs with bytes as `datasets` writes them.

    Returns:
        The pairs, and how many rows were left out: ties (both labels 0.5) and rows whose ``has_label`` is false.

    Raises:
        FileNotFoundError: there is no such file, or not an image that a line names.
        ValueError: file and row of what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"pairs file {path} does not exist.")
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(
            f"{path}: pairs are read from .parquet or .jsonl files, not {path.suffix or 'one without suffix'}."
        )
    pairs, left_out = _parquet_pairs(path) if path.suffix == ".parquet" else (list(_json_pairs(path)), 0)
    if not pairs:
        raise ValueError(
            f"{path} holds no pair of which one image was chosen ({left_out} rows are ties): give another."
        )
    return pairs, left_out


def _json_pairs(path: Path) -> Iterator[Pair]:
    seen: set[int | str] = set()
    with path.open("rb") as file:
        for index, raw in enumerate(file):
            source = f"{path}, line {index + 1}"
            try:
                line = raw.decode("utf-8-sig" if index == 0 else "utf-8").strip()
                if not line:
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object with prompt, chosen and rejected, found {type(row).__name__}")
                identity, text = row.pop("id", index), _text(row.pop("prompt", None), "prompt")
                chosen, rejected = (path.parent / _text(row.pop(key, None), key) for key in ("chosen", "rejected"))
                if not isinstance(identity, int | str) or isinstance(identity, bool) or identity in seen:
                    raise ValueError(f"id is {identity!r}, and must be a whole number or a text that no other line has")
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise ValueError(f"{source}: {error}.") from None
            for image in (chosen, rejected):
                if not image.is_file():
                    raise FileNotFoundError(
                        f"{source}: {image} does not exist: paths start from the file's own folder."
                    )
            seen.add(identity)
            yield Pair(Prompt(text, identity, row), chosen, rejected, source)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}, and must be a text that is not empty")
    return value


def _parquet_pairs(path: Path) -> tuple[list[Pair], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs: list[Pair] = []
    left_out = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise ValueError(f"{path} has no column {', '.join(missing)}: expected {', '.join(COLUMNS)}.")
            _refuse_large(path, file)
            columns = [*COLUMNS, *(["has_label"] if "has_label" in names else [])]
            start = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for number, row in enumerate(batch.to_pylist(), start):
                    pair = _row_pair(path, number, row)
                    pairs += [pair] if pair else []
                    left_out += pair is None
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read as parquet ({reason}): give a file that is whole.") from None
    return pairs, left_out


def _refuse_large(path: Path, file: Any) -> None:
    groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in PICTURES)
    if size > MAX_PARQUET_BYTES:
        raise ValueError(
            f"{path} holds {size:,} bytes of images, and at most {MAX_PARQUET_BYTES:,} are read into memory: give a "
            "part of it, or a .jsonl beside image files, which are read as they are needed."
        )


def _row_pair(path: Path, number: int, row: dict[str, Any]) -> Pair | None:
    """The pair of a row, None for a tie."""
    source = f"{path}, row {number}"
    labels = tuple(row[name] for name in LABELS)
    if row.get("has_label", True) is False or labels == _TIE:
        return None
    if labels not in _WINNER:
        raise ValueError(f"{source}: the labels are {labels}, and must be 1 and 0, or 0.5 twice for a tie.")
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        raise ValueError(f"{source}: caption is {row['caption']!r}, and must be a text that is not empty.")
    images = [cell["bytes"] if isinstance(cell, dict) and "bytes" in cell else cell for cell in map(row.get, PICTURES)]
    for name, image in zip(PICTURES, images, strict=True):
        if not isinstance(image, bytes):
            raise ValueError(f"{source}: {name} is a {type(image).__name__}, and must be the bytes of an image file.")
    chosen = _WINNER[labels]
    return Pair(Prompt(row["caption"], number), images[chosen], images[1 - chosen], source)


def open_pair(pair: Pair, size: tuple[int, int]) -> Tensor:
    """The images of a pair, chosen first, (2, 3, H, W) in [0, 1] with `size` = (H, W).

    An image of another size is resized by Pillow's bicubic filter so that it covers the asked one, and cropped in the
    middle.

    Raises:
        ValueError: an image cannot be opened; the message says where it stands.
    """
    height, width = size
    images = []
    for name, source in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        try:
            image = _opened(source)
        except ValueError as error:
            raise ValueError(f"{pair.source}: the {name} image {error} Mend it, or take the row out.") from None
        fitting = image.size == (width, height)
        images.append(image if fitting else ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return media.from_pil(images)


def _opened(source: Path | bytes) -> Image.Image:
    if isinstance(source, Path):
        return media.open_image(source)
    # The bounded reader opens files: this one is gone again when its pixels are there.
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        file = Path(folder) / "image"
        file.write_bytes(source)
        try:
            return media.open_image(file)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{file} ")) from None


def write_pairs(path: str | Path, rows: Iterable[Judged]) -> int:
    """Writes pairs in Pick-a-Pic's columns, with the columns reward_0 and reward_1; returns their number.

    Images are written as PNG, without loss, whatever their column is called. The file has its name when it is whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"caption": pa.string(), **dict.fromkeys(PICTURES, pa.binary()), **dict.fromkeys(LABELS, pa.float64())}
    schema = pa.schema(kinds | {"reward_0": pa.float64(), "reward_1": pa.float64()})
    part, count = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        # Dictionaries and statistics would hold every image a second and a third time.
        with pq.ParquetWriter(part, schema, use_dictionary=False, write_statistics=False) as file:
            for group in _batched(map(_row, rows), _ROW_GROUP):
                file.write_table(pa.Table.from_pylist(group, schema))
                count += len(group)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of `size`, the last one shorter."""
    rows = iter(rows)
    while group := list(islice(rows, size)):
        yield group


def _row(judged: Judged) -> dict[str, Any]:
    first, second = judged.rewards
    if not first != second:
        raise ValueError(
            f"rewards {first} and {second} choose none of the images of {judged.prompt.text!r}: leave it out"
        )
    row: dict[str, Any] = {"caption": judged.prompt.text, "reward_0": first, "reward_1": second}
    row |= {"label_0": float(first > second), "label_1": float(second > first)}
    for name, image in zip(PICTURES, media.to_pil(judged.images.to(torch.uint8)), strict=True):
        buffer = BytesIO()
        image.save(buffer, format="PNG")
        row[name] = buffer.getvalue()
    return row
