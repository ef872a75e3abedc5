"""From items to pixels, decoded ahead by threads: once for all rewards, and never more than a bounded amount."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types
import torch
from torch import Tensor

from diffalign import media
from diffalign.scoring.items import Item, one_line

MAX_FILE_BYTES = 256 * 2**20  # of one encoded image inside a tar or a parquet file
_AHEAD_BYTES = 256 * 2**20  # of decoded pixels that wait
_THREADS = min(8, os.cpu_count() or 1)

Pixels = Tensor | str
"""(3, H, W) uint8, of a video (F, 3, H, W), or why there are none."""
Decoded = tuple[int, Item, Pixels]
_Waiting = deque[tuple[int, Item, Future[tuple[Item, Pixels]]]]


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of Pillow about files that are decoded all the same; threads undo what `media` does about them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def decode_ahead(items: Iterable[tuple[int, Item]], videos: bool) -> Iterator[Decoded]:
    """The pixels of (index, item) pairs, in their order.

    Args:
        items: what to decode, with any number.
        videos: whether videos are decoded too; without, each is told to be one, and not opened.
    """
    cells = _Cells()
    waiting: _Waiting = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for index, item in items:
                while len(waiting) >= 2 * _THREADS or _bytes(waiting) > _AHEAD_BYTES:
                    yield _next(waiting)
                # Cells are read here, one after the other: a parquet file has no cheap way to a single row.
                data = cells.read(item) if item.cell and not item.problem else None
                waiting.append((index, item, pool.submit(decode, item, data, videos)))
            while waiting:
                yield _next(waiting)
        finally:
            for _, _, future in waiting:
                future.cancel()


def _next(waiting: _Waiting) -> Decoded:
    index, _, future = waiting.popleft()
    return index, *future.result()


def _bytes(waiting: _Waiting) -> int:
    """Of the pixels that wait; a video that is being decoded counts for as much as two may take together."""
    total = 0
    for _, item, future in waiting:
        if not future.done():
            total += _AHEAD_BYTES // 2 if item.is_video else 0
        elif isinstance(pixels := future.result()[1], Tensor):
            total += pixels.nbytes
    return total


def decode(item: Item, data: bytes | str | None, videos: bool) -> tuple[Item, Pixels]:
    """The pixels of one item, and the item with what its file says of itself: the `fps` of a video in its metadata.

    Args:
        item: of a file, or of a member of a tar.
        data: the encoded image where it is a cell of a parquet file, or why that could not be read; else None.
        videos: whether to open a video.
    """
    if item.problem or isinstance(data, str):
        return item, item.problem or data
    if item.is_video and not videos:
        return item, "is a video, and images are scored"
    try:
        if item.span:
            data = member_bytes(item)
        if data is None:
            return _opened(item, item.file)
        # Files are opened by their paths: this one is gone again when its pixels are there.
        with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
            file = Path(folder) / "file"
            file.write_bytes(data)
            return _opened(item, file)
    except Exception as error:
        # Whatever a broken file does to a decoder, it costs its own row alone. KeyboardInterrupt passes.
        told = one_line(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        return item, one_line(told)


def _opened(item: Item, file: Path) -> tuple[Item, Pixels]:
    try:
        if item.is_video:
            video = media.open_video(file)
            return replace(item, metadata={"fps": video.fps} | item.metadata), video.frames
        return item, torch.from_numpy(np.array(media.open_image(file))).permute(2, 0, 1).contiguous()
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{file} ")) from None


def member_bytes(item: Item) -> bytes:
    """The encoded image of a member of a tar. ValueError: it has too many bytes, or the tar too few."""
    offset, size = item.span
    if size > MAX_FILE_BYTES:
        raise ValueError(f"has {size:,} bytes: at most {MAX_FILE_BYTES:,} are read")
    with item.file.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"the tar ends after {len(data):,} of its {size:,} bytes")
    return data


class _Cells:
    """Cells of parquet files, read forward; going on to the next row costs only that row."""

    def __init__(self) -> None:
        self.place: tuple[Path, str] | None = None

    def read(self, item: Item) -> bytes | str:
        """The bytes of a cell, or why they cannot be had."""
        column, row = item.cell
        try:
            if self.place != (item.file, column):
                self._open(item.file, column)
            value = self._cell(row)
        except (pa.ArrowException, OSError, StopIteration) as error:
            self.place = None
            return f"cannot be read from its parquet file: {one_line(error)}"
        if value is None:
            return "the cell is empty"
        return (
            value if len(value) <= MAX_FILE_BYTES else f"has {len(value):,} bytes: at most {MAX_FILE_BYTES:,} are read"
        )

    def _open(self, path: Path, column: str) -> None:
        self.file = pq.ParquetFile(path, pre_buffer=False)  # buffering ahead would hold a whole row group
        self.nested = types.is_struct(self.file.schema_arrow.field(column).type)
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])
        self.group, self.first, self.batch = -1, 0, []
        self.place = (path, column)

    def _cell(self, row: int) -> bytes | None:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if group != self.group or row < self.first:
            column = f"{self.place[1]}.bytes" if self.nested else self.place[1]
            self.batches = self.file.iter_batches(batch_size=16, row_groups=[group], columns=[column])
            self.group, self.first, self.batch = group, int(self.starts[group]), []
        while row >= self.first + len(self.batch):
            self.first += len(self.batch)
            self.batch = next(self.batches).column(0)
        value = self.batch[row - self.first].as_py()
        return value["bytes"] if isinstance(value, dict) else value
