"""What is to be scored: one item for each file, row of a list or member of an archive, in an order that stands."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

IMAGES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
VIDEOS = {".gif", ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg"}
MEDIA = IMAGES | VIDEOS
"""Suffixes of files in folders and tars that get a row; whether such a file can be opened is told in its row."""

MAX_TEXT_BYTES = 2**20  # of a sidecar


@dataclass(frozen=True)
class Item:
    """One image or video, not opened yet.

    Attributes:
        name: what its row is called: the path as it was given, of a member or row with that of its archive in front.
        file: the file that holds its pixels.
        prompt: None where nothing gives one.
        metadata: what else its list or sidecar says of it.
        folder: where paths in its metadata start; None: the folder of `file`, or inside the tar.
        folders: key of the metadata -> where its paths start, of those that do not start in `folder`.
        references: key of the metadata -> the files that it names; see `with_references`.
        span: (offset, bytes) of its pixels in a tar.
        cell: (column, row) of its pixels in a parquet file.
        stamp: (bytes, modification time in ns) of `file`; another one means other content.
        problem: why it cannot be scored, where that is known already.
    """

    name: str
    file: Path
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    folders: dict[str, Path] = field(default_factory=dict)
    references: dict[str, tuple[Item, ...]] = field(default_factory=dict)
    span: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    stamp: tuple[int, int] | None = None
    problem: str | None = None

    @property
    def is_video(self) -> bool:
        """Told by the name."""
        return Path(self.name).suffix.casefold() in VIDEOS

    @property
    def digest(self) -> str:
        """Of all that its scores depend on, the pixels of every file by its size and time."""
        told = [self.name, self.prompt, self.metadata, self.span, self.cell, self.stamp, self.problem]
        told += [reference.digest for key in sorted(self.references) for reference in self.references[key]]
        return blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def stamp_of(path: Path) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def file_item(path: Path, prompt: str | None, metadata: dict[str, Any], problem: str | None = None) -> Item:
    """The item of a file, whose presence and kind are looked at here; nothing is opened."""
    stamp = None
    try:
        status = path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        if stat.S_ISDIR(status.st_mode):
            problem = "is a folder, not a file"
        elif not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            problem = "is not a regular file"
    except FileNotFoundError:
        problem = "there is no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        problem = f"cannot be looked at: {one_line(error)}"
    return Item(printable(path), path, prompt, metadata, stamp=stamp, problem=problem)


def folder_items(folder: Path) -> Iterator[Item]:
    """Media files below a folder, by name, with the prompts and metadata of their sidecars.

    A folder with a `samples.jsonl`, as `diffalign sample` writes it, holds what that file lists and nothing else.
    """
    from diffalign.scoring.lists import list_items

    failed: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=failed.append):
        if "samples.jsonl" in files:
            folders.clear()
            yield from list_items(Path(root) / "samples.jsonl", None)
            continue
        named_as_media = {name for name in folders if Path(name).suffix.casefold() in MEDIA}
        folders[:] = sorted(set(folders) - named_as_media)
        for name in sorted(named_as_media.union(files)):
            path = Path(root) / name
            if path.suffix.casefold() in MEDIA:
                yield file_item(path, *sidecar(path))
    for error in failed:
        place = Path(error.filename)
        yield Item(printable(place), place, problem=f"cannot be looked at: {one_line(error)}")


def sidecar(path: Path) -> tuple[str | None, dict[str, Any], str | None]:
    """(prompt, metadata, problem) from `NAME.json`, an object with the prompt, and `NAME.txt`, the prompt alone."""
    prompt, metadata = None, {}
    for suffix in (".txt", ".json"):
        file = path.with_suffix(suffix)
        if not file.is_file():
            continue
        try:
            with file.open("rb") as opened:
                text, more = sidecar_text(suffix, opened.read(MAX_TEXT_BYTES + 1))
        except (OSError, ValueError, RecursionError) as error:
            return prompt, metadata, f"{printable(file)}: {one_line(error)}"
        prompt, metadata = text or prompt, metadata | more
    return prompt, metadata, None


def sidecar_text(suffix: str, data: bytes) -> tuple[str | None, dict[str, Any]]:
    """(prompt, metadata) that a `.txt` or `.json` beside an image says; ValueError where it says nothing that holds."""
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"has more than {MAX_TEXT_BYTES:,} bytes")
    text = data.decode("utf-8-sig")
    if suffix == ".txt":
        return text.strip() or None, {}
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__}, and must hold an object with the key prompt")
    prompt = row.pop("prompt", None)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}, and must be a text")
    return (prompt or "").strip() or None, row


def printable(path: Path) -> str:
    """A path as text that every file can hold; bytes that are no UTF-8 are written out."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # JSON can say halves of characters, which no path has
        return str(path).encode("utf-8", "backslashreplace").decode()


def one_line(error: object, most: int = 300) -> str:
    """A message on one line, cut, and without what UTF-8 cannot hold."""
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"
