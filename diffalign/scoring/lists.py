"""Lists of files: CSV, JSONL and parquet, a row for each item, with its prompt and whatever else is known of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.scoring.items import Item, file_item, one_line, printable, stamp_of

PATH_COLUMNS = ("path", "file", "file_name", "filename", "image_path", "image", "video")
PROMPT_COLUMNS = ("prompt", "caption", "text")

Row = dict[str, Any]


def list_items(path: Path, prompt_column: str | None) -> Iterator[Item]:
    """The items of a list; paths in it start from its own folder.

    Args:
        path: a `.csv` with a header, a `.jsonl`, or a `.parquet` whose pixels may be in a column of bytes.
        prompt_column: where the prompt is; default: the first of prompt, caption and text.

    Raises:
        ValueError: the list cannot be read, or lacks a column; file, line and columns are named.
    """
    if path.suffix.casefold() == ".parquet":
        yield from _parquet_items(path, prompt_column)
        return
    read = _csv_rows if path.suffix.casefold() == ".csv" else _json_rows
    for line, row in read(path):
        column = _path_column(path, row)
        prompt = _take_prompt(path, row, prompt_column)
        name = row.pop(column)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, line {line}: {column} is {name!r}, and must be the path of a file.")
        yield replace(file_item(path.parent / Path(name), prompt, row), folder=path.parent)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("has another number of cells than the header")
                yield reader.line_num, row
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {one_line(error)}.") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"holds {type(row).__name__}, and must hold an object with a path")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {one_line(error)}.") from None
            yield number, row


def _path_column(path: Path, columns: Row | Sequence[str]) -> str:
    for name in PATH_COLUMNS:
        if name in columns:
            return name
    known = " or ".join(PATH_COLUMNS)
    raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}: name the one with the files {known}.")


def _take_prompt(path: Path, row: Row, column: str | None) -> str | None:
    """Removes the prompt from a row and returns it; None where the cell is empty or there is no such column."""
    if column is not None and column not in row:
        raise ValueError(f"{path} has no column {column}: its columns are {', '.join(row)}.")
    found = column or next((name for name in PROMPT_COLUMNS if name in row), None)
    prompt = row.pop(found) if found else None
    return str(prompt).strip() or None if prompt is not None else None


def _parquet_items(path: Path, prompt_column: str | None) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            pixels = next((field.name for field in schema if holds_bytes(field.type)), None)
            column = pixels or _path_column(path, schema.names)
            others = [field.name for field in schema if field.name != pixels and not holds_bytes(field.type)]
            stamp, number = stamp_of(path), 0
            for batch in file.iter_batches(columns=others):
                for row in batch.to_pylist() if others else [{} for _ in range(batch.num_rows)]:
                    prompt = _take_prompt(path, row, prompt_column)
                    if pixels:
                        name = f"{printable(path)}/{number}"
                        yield Item(name, path, prompt, row, cell=(pixels, number), stamp=stamp)
                    else:
                        item = file_item(path.parent / str(row.pop(column)), prompt, row)
                        yield replace(item, folder=path.parent)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield Item(printable(path), path, problem=f"cannot be read as parquet: {one_line(error)}")


def holds_bytes(kind: Any) -> bool:
    """Whether a parquet column holds encoded images: bytes, or a struct with bytes, as in Hugging Face datasets."""
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_bytes(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind)
