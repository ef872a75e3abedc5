"""What is wrong with a recipe, in words: pydantic's errors as keys, values and remedies."""

from __future__ import annotations

import difflib
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from diffalign.recipe_file import KIND_KEYS
from diffalign.settings import ByName

Path = tuple[str | int, ...]
SCREEN = 23  # lines


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the key (or file) with its value, and a message that ends in the remedy."""

    key: str
    message: str


class RecipeError(ValueError):
    """A recipe or an input that cannot be used; `str()` is one screen with every problem, its value and its remedy."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = list(problems)
        count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
        lines = [f"{source}: {count} wrong"]
        for told, problem in enumerate(problems):
            text = textwrap.wrap(problem.message, 96, initial_indent="    ", subsequent_indent="    ", max_lines=3)
            if len(lines) + 1 + len(text) > SCREEN:
                lines.append(f"  and {len(problems) - told} more, told once these are right")
                break
            lines += [f"  {problem.key}", *text]
        super().__init__("\n".join(lines))


def schema_problems(model: type[BaseModel], tree: Any, error: ValidationError) -> list[Problem]:
    """The problems behind a ValidationError of `model` on `tree`, one for each key of the file."""
    messages: dict[Path, list[str]] = {}
    for detail in error.errors():
        path, loc = _file_path(tree, detail["loc"]), detail["loc"]
        if loc[:1] == ("evaluation",) and len(loc) > 1 and loc[1] not in tree.get("evaluation", {}):
            continue  # a value taken over from the method, where it is told already
        messages.setdefault(path, []).append(_message(model, tree, path, detail))
    return [Problem(_shown(tree, path), _joined(found)) for path, found in messages.items()]


def _file_path(tree: Any, loc: Path) -> Path:
    """`loc` without the names that pydantic adds for a member of a union: only keys that a user could write."""
    path: list[str | int] = []
    node = tree
    for i, part in enumerate(loc):
        is_item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_item or (isinstance(node, dict) and part in node):
            node = node[part]  # type: ignore[index]
        elif not isinstance(node, dict) or i < len(loc) - 1 or _is_tag(node, part):
            continue
        path.append(part)
    return tuple(path)


def _is_tag(node: dict[str, Any], part: str | int) -> bool:
    return any(node.get(key) == part for key in KIND_KEYS)


def _message(model: type[BaseModel], tree: Any, path: Path, detail: Any) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(model, tree, path)
    if kind == "missing":
        return "is required: add it"
    if kind == "union_tag_not_found":
        return f"needs the key {context['discriminator']}, which says what the others mean"
    if kind == "union_tag_invalid":
        known = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        return (
            f"{context['discriminator'].strip(chr(39))} {context['tag']!r} is unknown: {suggest(context['tag'], known)}"
        )
    if kind == "literal_error":
        known = [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")]
        return f"should be one of {', '.join(known)}" + _near(value, known)
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "should be a section with keys of its own"
    quoted = (
        f", not the text {value!r}: take the quotes off"
        if kind in ("int_type", "float_type") and isinstance(value, str)
        else ""
    )
    return detail["msg"].replace("Input should be", "should be") + quoted


def _joined(messages: list[str]) -> str:
    """Messages about one value, of the members of a union that it could have been."""
    unique = list(dict.fromkeys(messages))
    return (
        unique[0]
        if len(unique) == 1
        else ", or ".join([unique[0], *(m.removeprefix("should be ") for m in unique[1:])])
    )


def _unknown_key(model: type[BaseModel], tree: Any, path: Path) -> str:
    beside = sorted({name for each in _models_at(model, tree, path[:-1]) for name in each.model_fields})
    near = difflib.get_close_matches(str(path[-1]), beside, n=1)
    if near:
        return f"is no known key: did you mean {near[0]}?"
    keys = list(dict.fromkeys(_all_keys(model)))
    near = difflib.get_close_matches(str(path[-1]), {key.rsplit(".", 1)[-1] for key in keys}, n=1, cutoff=0.8)
    if near:
        elsewhere = " or ".join(key for key in keys if key.rsplit(".", 1)[-1] == near[0])
        return f"is no key of this section: did you mean {elsewhere}?"
    return f"is no known key: remove it, or use one of {', '.join(beside)}"


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The models that a field may hold."""
    return [model for part in (field.annotation, *field.metadata) for model in _models(part)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type, or what stands beside it in `Annotated`, allows."""
    if isinstance(annotation, ByName):  # a method: whichever is registered
        return list(annotation.table.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _models_at(model: type[BaseModel], tree: Any, path: Path) -> list[type[BaseModel]]:
    """The models that the section at `path` may be, by its `name`, `kind` or `type` where it has one."""
    models = [model]
    for part in path:
        tree = tree[part]
        if isinstance(part, str):
            models = [m for each in models if part in each.model_fields for m in _models_of(each.model_fields[part])]
        models = [m for m in models if _fits(m, tree)] or models
    return models


def _fits(model: type[BaseModel], section: Any) -> bool:
    for key in KIND_KEYS:
        kind = model.model_fields[key].default if key in model.model_fields else None
        if isinstance(kind, str) and isinstance(section, dict) and section.get(key, kind) != kind:
            return False
    return True


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_of(field):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _shown(tree: Any, path: Path) -> str:
    key = ".".join(map(str, path)) or "the recipe"
    node = tree
    for part in path:
        if isinstance(node, dict) and part not in node:
            return key
        node = node[part]  # type: ignore[index]
    text = json.dumps(node, ensure_ascii=False) if not isinstance(node, str) else node
    return key if isinstance(node, dict) or not path else f"{key} = {textwrap.shorten(text, 60, placeholder=' ...')}"


def suggest(name: Any, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: a near miss if there is one, and every known name."""
    near = difflib.get_close_matches(str(name).casefold(), known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def _near(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f": did you mean {near[0]}?" if near else ""
