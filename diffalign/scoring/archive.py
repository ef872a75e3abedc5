"""WebDataset tars: which members belong together, and where in the file each image begins. Nothing is unpacked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.scoring.items import MAX_TEXT_BYTES, MEDIA, Item, one_line, printable, sidecar_text, stamp_of

_MAX_READ = 64 * 2**20


class _BoundedFile(io.FileIO):
    """A file that gives at most 64 MiB at once: a header that announces gigabytes is not believed."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header asks for {size:,} bytes")
        return super().read(size)


def tar_items(path: Path) -> Iterator[Item]:
    """One item for each image or video of a tar, with the `.txt` and `.json` of the same key.

    The key of a member is its path up to the first dot of its name, as in WebDataset. A tar that breaks off gives
    what came before, and an item that says where it broke.
    """
    stamp = stamp_of(path)
    members: list[tuple[str, Item]] = []
    texts: dict[str, dict[str, Any]] = {}
    problem = None
    try:
        with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                if member.isdir():
                    continue
                key, suffix = _key(member.name)
                if suffix in MEDIA:
                    members.append((key, _item(path, member, stamp)))
                elif suffix in (".txt", ".json") and member.isreg():
                    texts.setdefault(key, {})[suffix] = _text(tar, member)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        problem = f"the tar cannot be read to its end: {one_line(error)}"
    for key, item in members:
        yield _with_texts(item, texts.get(key, {}))
    if problem:
        yield Item(printable(path), path, stamp=stamp, problem=problem)


def _key(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0]), path.suffix.casefold()


def _item(path: Path, member: tarfile.TarInfo, stamp: tuple[int, int]) -> Item:
    name = f"{printable(path)}/{printable(Path(member.name))}"
    plain = member.isreg() and not member.issparse()
    span = (member.offset_data, member.size)
    return Item(name, path, span=span, stamp=stamp, problem=None if plain else "is a link or no plain file of the tar")


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str | None, dict[str, Any]] | str:
    """(prompt, metadata), or why it cannot be read."""
    if member.size > MAX_TEXT_BYTES or member.issparse():
        return f"{member.name} has more than {MAX_TEXT_BYTES:,} bytes"
    try:
        return sidecar_text(PurePosixPath(member.name).suffix.casefold(), tar.extractfile(member).read())
    except (ValueError, RecursionError) as error:
        return f"{member.name}: {one_line(error)}"


def _with_texts(item: Item, texts: dict[str, Any]) -> Item:
    prompt, metadata, problem = None, {}, item.problem
    for suffix in (".txt", ".json"):
        found = texts.get(suffix)
        if isinstance(found, str):
            problem = problem or one_line(found)
        elif found is not None:
            prompt, metadata = found[0] or prompt, metadata | found[1]
    return replace(item, prompt=prompt, metadata=metadata, problem=problem)
