"""Reward recipes: YAML that says which scorer, from where, in which units and under which licence; and `load`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from diffalign.recipe_file import parse_yaml
from diffalign.registry import Registry, UnknownName, data_root, resolve_data
from diffalign.rewards.base import Reward

REWARDS: Registry[Callable[[], Reward]] = Registry("reward")
"""Rewards that need no recipe: name -> builder. Plug-ins add to it by the entry point group ``diffalign.rewards``."""

_MAX_BYTES = 100_000


class RewardRecipe(BaseModel):
    """One scorer and what a user must know about it. A type of recipe adds its own keys and says how it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="its column in metrics: reward/<name>, heldout/<name>")
    type: str = Field(description="how to score")
    scale: str = Field(description="units and typical range of the score")
    licence: str = Field(description="of the weights")
    source: str = Field(description="paper, model card or command that made it")
    size: str = Field("", description="parameters, or bytes to download")
    needs: tuple[str, ...] | None = Field(
        None, description="prompt, and the keys of the prompt's metadata that it reads"
    )
    differentiable: bool | None = Field(
        None, description="whether its scores have gradients with respect to the pixels"
    )
    token_limit: PositiveInt | None = Field(
        None, description="of the prompt; what is past it is cut off with a warning"
    )
    summary: str = Field("", description="one line for listings")

    def build(self, folder: Path) -> Reward:
        """The reward; relative paths start from `folder`."""
        raise NotImplementedError


REWARD_TYPES: Registry[type[RewardRecipe]] = Registry("reward type")
"""Types of recipe by name. A plug-in registers its own subclass of `RewardRecipe`."""


def load(reward: str | Path | Mapping[str, Any] | RewardRecipe) -> Reward:
    """A reward by name, recipe file or recipe.

    Args:
        reward: a name that `reward_names` lists (``zoo:NAME`` too), the path of a ``.yaml`` recipe, or the recipe
            itself as a mapping; relative paths inside a mapping start from the working directory.

    Raises:
        UnknownName: no reward of that name; near misses are named.
        ValueError: the recipe is wrong; file, key and value are named.
    """
    token = _built.set({})
    try:
        return part(reward, Path.cwd())
    finally:
        _built.reset(token)


_built: ContextVar[dict[str, Reward | None]] = ContextVar("built")


def part(reward: str | Path | Mapping[str, Any] | RewardRecipe, folder: Path) -> Reward:
    """As `load`, for a reward inside another: files start from `folder`, and what is named twice is one reward."""
    if isinstance(reward, RewardRecipe | Mapping):
        recipe = reward if isinstance(reward, RewardRecipe) else _validated(dict(reward), "reward recipe")
        return built(recipe, folder)
    name, known, path = _plain(reward), _built.get(), recipe_path(reward, folder)
    if path is None and name not in REWARDS.names():
        raise UnknownName("reward", str(reward), reward_names())
    key = name if path is None else str(path.resolve())
    if key not in known:
        known[key] = None  # under construction
        known[key] = REWARDS.get(name)() if path is None else built(read_recipe(path), path.parent)
    found = known[key]
    if found is None:
        raise ValueError(f"reward {reward} is made of itself: name another inside its recipe")
    return found


def recipe_path(reward: str | Path, folder: Path) -> Path | None:
    """The recipe that a reward's name or file means; None for a name that needs none, or that nobody has.

    Args:
        reward: a name, ``zoo:NAME`` too, or the path of a ``.yaml`` recipe, which need not be there.
        folder: where a relative path starts.
    """
    if str(reward).endswith((".yaml", ".yml")):
        return folder / Path(reward).expanduser()
    return shipped_recipes().get(_plain(reward))


def _plain(name: str | Path) -> str:
    return str(name).removeprefix("zoo:").casefold()


def reward_names() -> list[str]:
    """Every name that `load` knows."""
    return sorted({*REWARDS.names(), *shipped_recipes()})


def shipped_recipes() -> dict[str, Path]:
    """The reward recipes that come with the package, by name."""
    return {path.stem.casefold(): path for path in sorted(data_root("rewards").glob("*.yaml"))}


def read_recipe(path: Path) -> RewardRecipe:
    """Reads and checks a recipe file; no weight is loaded. FileNotFoundError or ValueError, with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"reward recipe {path} does not exist.")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes and is no reward recipe.")
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, and a reward recipe is a mapping.")
    return _validated(tree, str(path))


def _validated(tree: dict[str, Any], place: str) -> RewardRecipe:
    try:
        kind = REWARD_TYPES.get(str(tree.get("type", "")))
        return kind.model_validate(tree)
    except UnknownName as error:
        raise ValueError(f"{place}: type: {error}") from None
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r})" for e in error.errors())
        raise ValueError(f"{place}: {told}") from None


def built(recipe: RewardRecipe, folder: Path) -> Reward:
    """The reward of a recipe.

    Raises:
        ValueError: it is not what the recipe says of it.
    """
    reward = recipe.build(folder)
    for fact in ("needs", "differentiable", "token_limit"):
        said, found = getattr(recipe, fact), getattr(reward, fact)
        if said is not None and said != found:
            raise ValueError(f"the recipe of {recipe.name} says {fact}: {said}, and the reward has {found}: correct it")
    return reward


def located(path: str, folder: Path) -> str | Path:
    """A shipped or local folder or file as a path, a hub id as it is.

    Raises:
        ValueError: it is none of them.
    """
    local = resolve_data(path, relative_to=folder)
    if local.exists():
        return local
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)*", path):
        return path
    raise ValueError(f"path: {path} is neither a folder or file (looked at {local}) nor a hub id owner/name.")
