"""Names to things: registries of code, the files that ship with the package, names and suffixes of files of data."""

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path, PurePosixPath
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")
PAIR_SUFFIXES = (".parquet", ".jsonl", ".json")
"""What `diffalign.data` reads, here since recipes are checked without torch, which importing it loads."""


def leads_out(name: str) -> bool:
    """Whether a name from data, taken from a folder, is of something outside it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


class UnknownName(ValueError):
    """A name that nothing answers to; the message lists near misses and every known name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name.casefold(), names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        listing = ", ".join(names) if names else f"there is no {kind} yet"
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {listing}")
        self.name = name


class Registry(Generic[T]):
    """A table of named things of one kind. Case does not matter in names.

    Plug-ins add to it by an entry point in the group ``diffalign.<kind>s`` (``diffalign.rewards``,
    ``diffalign.policies``); one is loaded only when its name is asked for.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group = f"diffalign.{kind[:-1]}ies" if kind.endswith("y") else f"diffalign.{kind}s"
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``; a name can be taken only once."""
        key = name.casefold()

        def enter(thing: T) -> T:
            if key in self._things:
                raise ValueError(f"{self.kind} {key!r} is registered twice: choose another name for {thing!r}")
            self._things[key] = thing
            return thing

        return enter

    def get(self, name: str) -> T:
        """Return the thing of that name, or raise :class:`UnknownName`."""
        key = name.casefold()
        if key not in self._things:
            plugins = self._plugins()
            if key not in plugins:
                raise UnknownName(self.kind, name, self.names())
            # Loading may itself register the name; what the plug-in registered then stands.
            loaded = plugins[key].load()
            self._things.setdefault(key, loaded)
        return self._things[key]

    def names(self) -> list[str]:
        """Return every known name in order, plug-ins that are not loaded yet included."""
        return sorted({*self._things, *self._plugins()})

    def _plugins(self) -> dict[str, EntryPoint]:
        return {entry.name.casefold(): entry for entry in entry_points(group=self.group)}


def data_root(folder: Literal["assets", "pipelines", "rewards"] = "assets") -> Path:
    """Return a folder that ships with the package, in a checkout and in an installed wheel alike."""
    package = Path(__file__).resolve().parent
    shipped = package / "_data" / folder
    return shipped if shipped.is_dir() else package.parent / folder


def resolve_data(name: str | Path, relative_to: Path) -> Path:
    """Turn a name in a recipe into a path.

    Args:
        name: ``zoo:NAME`` or ``prompts:NAME`` for what ships with the package, else a path (``~`` is expanded).
        relative_to: the folder that relative paths start from, usually that of the recipe.

    Returns:
        An existing path for shipped names; any other path is returned whether it exists or not.

    Raises:
        UnknownName: nothing of that name ships with the package.
    """
    scheme, separator, key = str(name).partition(":")
    if not separator or scheme not in ("zoo", "prompts"):
        return relative_to / Path(name).expanduser()
    folder = data_root() / scheme
    # Only names found by listing are opened, so "zoo:../elsewhere" finds nothing.
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    shipped = {(entry.name if entry.is_dir() else entry.stem).casefold(): entry for entry in entries}
    if key.casefold() not in shipped:
        raise UnknownName(f"{scheme}: name", key, shipped)
    return shipped[key.casefold()]


def locate(name: str | Path) -> str:
    """Return what a loader takes: the path of what ships or lies on disk, any other name (a hub id) as it is."""
    path = resolve_data(name, Path.cwd())
    return str(path) if path.exists() else str(name)
