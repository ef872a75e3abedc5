"""Recipe files as plain trees: strict YAML, `extends`, and `key.sub=value` overrides.

What the keys mean is the business of `diffalign.config`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffalign.registry import data_root

MAX_BYTES = 1_000_000
# A mapping that says its kind replaces one of another kind whole: the keys of one kind mean nothing to the other.
KIND_KEYS = ("name", "kind", "type")

Tree = dict[str, Any]


class FileProblem(ValueError):
    """A recipe that cannot be read as a tree: `key` is the file or key, the message has the value and the remedy."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (`no` is a word, 1e-3 a number); no repeated keys, aliases or merges.

    Aliases let a few lines grow to gigabytes, and `extends` does the same work.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own mutable class attribute, emptied for this class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: write the value out, or share it with `extends`",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not a text: put it in quotes", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is there twice, first in line {seen[key].line + 1}: keep one",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, key: str) -> Any:
    """One YAML document as dicts, lists and scalars.

    Args:
        text: the document.
        key: where it comes from, for the message.

    Raises:
        FileProblem: no valid YAML, a repeated key, an alias, a tag, a number that is not finite.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a stricter SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise FileProblem(key, f"{place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise FileProblem(key, f"is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise FileProblem(key, "is nested too deeply to be a recipe") from None
    except ValueError as error:  # e.g. an integer of more digits than Python converts
        raise FileProblem(key, f"has a value that cannot be read: {error}") from None
    _refuse_foreign(tree, key)
    return tree


def _refuse_foreign(tree: Any, key: str) -> None:
    """Leaves only what JSON can hold: a tag may make sets, dates and bytes, and .inf is no setting of anything."""
    if isinstance(tree, float) and not math.isfinite(tree):
        raise FileProblem(key, f"has the number {tree}, which is not finite: write a plain number")
    if tree is not None and not isinstance(tree, (dict, list, str, bool, int, float)):
        raise FileProblem(key, f"has {tree!r}, made by a tag: write a text, a number, a list or a mapping without !!")
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        _refuse_foreign(child, key)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(data_root("pipelines").glob("*.yaml"))}


def find_recipe(name: str | Path, relative_to: Path) -> Path:
    """The file of a recipe: a path, else the name of a shipped recipe. FileProblem when there is neither."""
    path = relative_to / Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    beside = (
        [str(other.relative_to(relative_to)) for other in path.parent.glob("*.y*ml")]
        if path.is_relative_to(relative_to)
        else []
    )
    near = difflib.get_close_matches(str(name), [*shipped, *beside], n=1)
    hint = f"did you mean {near[0]}?" if near else "`diffalign ls recipes` lists those that come with the package"
    what = "is a folder, not a recipe file" if path.is_dir() else "does not exist"
    raise FileProblem(str(name), f"{what}; {hint}")


def read_tree(path: Path, anchor: Any, _below: tuple[Path, ...] = ()) -> Tree:
    """The tree of a recipe file over that of the recipes it extends.

    Args:
        path: the file.
        anchor: called as anchor(tree, folder) on each file's own tree, to make its relative paths absolute in place.

    Raises:
        FileProblem: see `parse_yaml`; also a file that cannot be read, is too large, is no mapping, or extends itself.
    """
    place = _shown(path)
    path = path.resolve()
    if path in _below:
        chain = " -> ".join(p.name for p in (*_below[_below.index(path) :], path))
        raise FileProblem(place, f"extends itself ({chain}): remove one `extends`")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FileProblem(place, f"has {size:,} bytes and a recipe at most {MAX_BYTES:,}: is it the right file?")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileProblem(place, "is not text in UTF-8: is it the right file?") from None
    except OSError as error:
        raise FileProblem(place, f"cannot be read: {error.strerror}") from None
    tree = parse_yaml(text, place)
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"holds {_kind(tree)}"
        raise FileProblem(place, f"{what}, and a recipe is a mapping: start from `diffalign cp NAME {path.name}`")
    tree.pop("recorded", None)  # what a run adds to its config.yaml
    base = tree.pop("extends", None)
    anchor(tree, path.parent)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise FileProblem(f"{place}: extends", f"is {base!r}, and names one recipe file")
    return merge(read_tree(find_recipe(base, path.parent), anchor, (*_below, path)), tree)


def read_overrides(overrides: Sequence[str]) -> Tree:
    """`["a.b=1", "c.0.d=x"]` as the tree {"a": {"b": 1}, "c": {"0": {"d": "x"}}}; values are YAML."""
    tree: Tree = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            flag = re.fullmatch(r"--?([\w.-]+)", key)
            written = f"{flag[1].replace('-', '_')}=VALUE" if flag else "key.sub=value"
            raise FileProblem(override, f"is no override: write {written}")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise FileProblem(
                    override, f"sets a key below {part}, to which an earlier override gives the value {node!r}"
                )
        node[parts[-1]] = parse_yaml(value, override)
    return tree


def merge(base: Any, over: Any, key: str = "") -> Any:
    """`over` on `base`: mappings are merged key by key, anything else is replaced; digits as keys index a list.

    A mapping that names another kind (`name`, `kind` or `type` differs) replaces the one below it whole.
    """
    if isinstance(base, list) and isinstance(over, dict) and over and all(part.isdecimal() for part in over):
        merged = list(base)
        for part, value in over.items():
            if int(part) >= len(base):
                raise FileProblem(f"{key}.{part}", f"is past the end: {key} has {len(base)} entries, counted from 0")
            merged[int(part)] = merge(base[int(part)], value, f"{key}.{part}")
        return merged
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if any(kind in base and kind in over and base[kind] != over[kind] for kind in KIND_KEYS):
        return over
    return base | {
        name: merge(base[name], value, f"{key}.{name}" if key else name) if name in base else value
        for name, value in over.items()
    }


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}.get(
        type(value), type(value).__name__
    )
