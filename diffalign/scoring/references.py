"""Files that the metadata of an item names, such as pictures of a subject: where they lie, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from tempfile import TemporaryDirectory
from typing import Any

from diffalign.media.files import ImageError, reading, shown
from diffalign.rewards import Reward
from diffalign.scoring.decode import MAX_FILE_BYTES, member_bytes
from diffalign.scoring.items import Item, file_item, one_line

_Members = Mapping[tuple[Path, str], Item]


def file_keys(reward: Reward) -> tuple[str, ...]:
    """The keys of the metadata that name files for a reward or for one inside it."""
    return tuple(dict.fromkeys(key for part in reward.walk() for key in part.files))


def with_references(items: Iterable[Item], keys: Collection[str]) -> list[Item]:
    """The items with the files that their metadata names; nothing is opened, and what is missing is told there.

    A path starts in the folder of the sidecar, the list or the prompt file that says it, and in a tar in the folder of
    the member, as another member. Such a member is a reference, and no item any more.

    Args:
        items: in order.
        keys: of the metadata that name files, each a path or a list of paths. Other values stay the reward's business.

    Raises:
        ValueError: nothing is left.
    """
    items = list(items)
    if not keys:
        return items
    members = {(item.file, item.name): item for item in items if item.span}
    found = [replace(item, references=dict(_references(item, keys, members))) for item in items]
    named = {(file.file, file.name) for item in found for files in item.references.values() for file in files}
    left = [item for item in found if not (item.span and (item.file, item.name) in named)]
    if not left:
        raise ValueError(
            f"nothing to score: {found[0].name} and all others are named as references ({', '.join(keys)})."
        )
    return left


def _references(item: Item, keys: Collection[str], members: _Members) -> Iterator[tuple[str, tuple[Item, ...]]]:
    for key in keys:
        told = item.metadata.get(key)
        told = told if isinstance(told, list) else [told]
        paths = [path for path in told if isinstance(path, str)]
        if paths and len(paths) == len(told):
            yield key, tuple(_reference(item, key, path, members) for path in paths)


def _reference(item: Item, key: str, path: str, members: _Members) -> Item:
    inside = item.span and key not in item.folders and not Path(path).is_absolute()
    if not inside:
        return file_item(item.folders.get(key, item.folder or item.file.parent) / path, None, {})
    name = normpath(PurePosixPath(item.name).parent / path)
    missing = Item(one_line(name), item.file, problem="there is no such image in the tar")
    return replace(members.get((item.file, name), missing), prompt=None, metadata={})


class References:
    """What the references of the items of a chunk hold, and where a reward can open them.

    A member of a tar lies in a temporary file until `clear`.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, tuple[int, int] | None], str] = {}
        self._folder: TemporaryDirectory | None = None
        self._names: dict[str, str] = {}  # of temporary files

    def digests(self, item: Item, keys: Collection[str]) -> dict[str, list[str]] | str:
        """Key -> sha256 of each file that it names, or why one of them cannot be read."""
        found: dict[str, list[str]] = {}
        for key in keys:
            for file in item.references.get(key, ()):
                try:
                    found.setdefault(key, []).append(self._digest(file))
                except (OSError, ValueError) as error:
                    told = str(error).removeprefix(f"{file.name} ").rstrip(".")
                    return one_line(f"{key} {shown(Path(one_line(file.name, 150)))}: {told}")
        return found

    def metadata(self, item: Item, keys: Collection[str]) -> dict[str, Any]:
        """The metadata with paths that can be opened, after `digests` has read them."""
        told = dict(item.metadata)
        for key in item.references.keys() & keys:
            paths = [self._path(file) for file in item.references[key]]
            told[key] = paths if isinstance(told[key], list) else paths[0]
        return told

    def named(self, reason: str) -> str:
        """A reason that tells of files by the names that they have for the user."""
        for path, name in self._names.items():
            reason = reason.replace(path, name)
        return reason

    def clear(self) -> None:
        """Forgets everything, and removes the temporary files."""
        if self._folder:
            self._folder.cleanup()
        self.__init__()

    def _digest(self, file: Item) -> str:
        place = file.file, file.span
        if place not in self._digests:
            self._digests[place] = self._read(file)
        return self._digests[place]

    def _read(self, file: Item) -> str:
        if file.problem:
            raise ValueError(file.problem)
        if file.span is None:
            with reading(file.file, ImageError, MAX_FILE_BYTES) as opened:
                return hashlib.sha256(opened.read()).hexdigest()
        data = member_bytes(file)
        digest = hashlib.sha256(data).hexdigest()
        self._folder = self._folder or TemporaryDirectory(prefix="diffalign-")
        path = Path(self._folder.name) / digest
        path.write_bytes(data)
        self._names[str(path)] = file.name
        return digest

    def _path(self, file: Item) -> str:
        if file.span is None:
            return str(file.file)
        assert self._folder is not None
        return str(Path(self._folder.name) / self._digests[file.file, file.span])
