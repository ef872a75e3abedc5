"""`diffalign ls`, `show` and `cp`: what ships, read from files and configs, without torch."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from diffalign.cli.errors import PACKAGE
from diffalign.config import Problem, Recipe, RecipeError, json_schema
from diffalign.finetune.config import METHODS as TRAINING
from diffalign.recipe_file import FileProblem, find_recipe, parse_yaml, read_tree, shipped_recipes
from diffalign.recipe_problems import suggest
from diffalign.recipe_references import anchor_paths, reward_names
from diffalign.registry import data_root
from diffalign.search.config import METHODS as SEARCHING
from diffalign.search_recipe import SearchRecipe
from diffalign.settings import Settings

Row = tuple[str, ...]
SCHEMAS: dict[str, type[Settings]] = {"schema": Recipe, "search-schema": SearchRecipe}


def recipes() -> Iterator[Row]:
    """(name, method, pipeline, what it is for) of each recipe that ships."""
    for name, path in shipped_recipes().items():
        tree = read_tree(path, anchor_paths)
        yield name, tree["method"]["name"], tree["pipeline"]["path"], _comment(path)


def rewards() -> Iterator[Row]:
    """(name, scale, licence, summary) of each reward."""
    for name in reward_names():
        file = data_root("rewards") / f"{name}.yaml"
        card = parse_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
        yield name, card.get("scale", ""), card.get("licence", ""), card.get("summary", "")


def methods() -> Iterator[Row]:
    """(name, command, summary) of each method."""
    for command, table in (("train", TRAINING), ("search", SEARCHING)):
        for name, config in table.items():
            yield name, command, _first_line(config)


def policies() -> Iterator[Row]:
    """(name, diffusers class) of each pipeline that ships."""
    for folder in sorted((data_root() / "zoo").glob("*/model_index.json")):
        index = json.loads(folder.read_text(encoding="utf-8"))
        yield f"zoo:{folder.parent.name}", index["_class_name"]


def prompts() -> Iterator[Row]:
    """(name, number of prompts, the first) of each prompt file that ships."""
    for file in sorted((data_root() / "prompts").glob("*.*")):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        first = json.loads(lines[0])["prompt"] if file.suffix == ".jsonl" else lines[0]
        yield f"prompts:{file.stem}", f"{len(lines):,}", first


KINDS: dict[str, tuple[Callable[[], Iterator[Row]], Row]] = {
    "recipes": (recipes, ("recipe", "method", "pipeline", "")),
    "rewards": (rewards, ("reward", "scale", "licence", "")),
    "methods": (methods, ("method", "command", "")),
    "policies": (policies, ("pipeline", "class")),
    "prompts": (prompts, ("prompts", "number", "the first")),
}


def print_listing(kinds: Sequence[str]) -> None:
    """Prints a table of each kind."""
    console = Console()
    for kind in kinds:
        rows, columns = KINDS[kind]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, column in enumerate(columns):
            table.add_column(column, no_wrap=place == 0)  # a name that is cut off cannot be typed
        for row in rows():
            table.add_row(*row)
        console.print(table)
        if kind != kinds[-1]:
            console.print()


def print_named(words: Sequence[str]) -> None:
    """Prints what answers to a name, or to a kind and a name; RecipeError when nothing does."""
    *kind, name = words
    if len(kind) > 1 or not set(kind) <= set(CARDS):
        raise RecipeError("show", [Problem(" ".join(words), f"is not a name, or a name after {', '.join(CARDS)}")])
    if name in SCHEMAS and not kind:
        print(json.dumps(json_schema(SCHEMAS[name]), indent=2))
        return
    kinds = kind or list(CARDS)
    cards = [card for card in (CARDS[each][1](name) for each in kinds) if card]
    if not cards:
        known = [row[0] for each in kinds for row in KINDS[CARDS[each][0]][0]()]
        what = f"no {kind[0]}" if kind else "nothing"
        hint = suggest(name, known if kind else [*SCHEMAS, *known])
        raise RecipeError("show", [Problem(name, f"is {what} that ships: {hint}")])
    print("\n\n".join(card.rstrip() for card in cards))


def _recipe(name: str) -> str | None:
    path = shipped_recipes().get(name)
    return None if path is None else path.read_text(encoding="utf-8")


def _reward(name: str) -> str | None:
    """The whole recipe: what it scores, in which units, paper, licence, needs and size."""
    if name not in reward_names():
        return None
    file = data_root("rewards") / f"{name}.yaml"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    places = [entry.value for entry in entry_points(group="diffalign.rewards") if entry.name.casefold() == name]
    return f"name: {name}\n# No card: a reward in code{', ' + places[0] if places else ''}."


def _method(name: str) -> str | None:
    """What it is and may be told, and the text of the file that it is in: equations, paper, departures."""
    config = TRAINING.get(name) or SEARCHING.get(name)
    if config is None:
        return None
    defaults = config.model_construct().model_dump()
    lines = [inspect.getdoc(config) or "", "", "method:"]
    for key, field in config.model_fields.items():
        note = f"  # {field.description}" if field.description else ""
        lines.append(f"  {key}: {json.dumps(defaults.get(key))}{note}")
    return "\n".join([*lines, *_file_text(config)])


def _file_text(config: type[Settings]) -> list[str]:
    """The docstring of the module that a method's settings refer to; read and not imported, for it needs torch."""
    named = re.search(r"see `diffalign\.([\w.]+)`", inspect.getdoc(config) or "")
    if named is None:
        return []
    file = PACKAGE / f"{named[1].replace('.', '/')}.py"
    return ["", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""]


def _policy(name: str) -> str | None:
    folder = data_root() / "zoo" / name.removeprefix("zoo:")
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if (folder / "model_index.json").is_file() and card.is_file() else None


def _prompts(name: str) -> str | None:
    stem = name.removeprefix("prompts:")
    for row in prompts():
        if row[0] == f"prompts:{stem}":
            file = next((data_root() / "prompts").glob(f"{stem}.*"))
            head = file.read_text(encoding="utf-8").splitlines()[:10]
            return "\n".join([f"# {row[1]} prompts; the first ten", *head])
    return None


CARDS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "recipe": ("recipes", _recipe),
    "reward": ("rewards", _reward),
    "method": ("methods", _method),
    "policy": ("policies", _policy),
    "prompts": ("prompts", _prompts),
}


def copy_recipe(name: str, destination: Path) -> Path:
    """Writes the recipe of that name or file to `destination` and returns the file; what it extends is written out.

    Relative paths become absolute, so that the copy means the same where it lies.
    """
    try:
        source = find_recipe(name, Path.cwd())
        tree = read_tree(source, anchor_paths)
    except FileProblem as problem:
        raise RecipeError(name, [Problem(problem.key, str(problem))]) from None
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise RecipeError("cp", [Problem(str(target), "exists already: choose another name, or remove it first")])
    text = source.read_text(encoding="utf-8")
    if parse_yaml(text, str(source)) == tree:  # it stands alone, and is copied with its comments
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith("# yaml-language-server")]
        content = "".join(lines)
    else:
        content = f"# {_comment(source)}\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    return target


def _comment(path: Path) -> str:
    """The first comment of a recipe that is meant for people."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "yaml-language-server" not in line:
            return line.lstrip("# ").rstrip()
    return ""


def _first_line(config: type[Settings]) -> str:
    return (inspect.getdoc(config) or "").splitlines()[0]
