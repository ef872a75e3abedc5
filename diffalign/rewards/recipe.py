"""Reward recipes: YAML that says which scorer, from where, in which units and under which licence; and `load`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.recipe_file import parse_yaml
from diffalign.registry import Registry, UnknownName, data_root, resolve_data
from diffalign.rewards.base import Reward

REWARDS: Registry[Callable[[], Reward]] = Registry("reward")
"""Rewards that need no recipe: name -> builder. Plug-ins add to it by the entry point group ``diffalign.rewards``."""

_MAX_BYTES = 100_000


class RewardRecipe(BaseModel):
    """One scorer and what a user must know about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="its column in metrics: reward/<name>, heldout/<name>")
    type: str = Field(description="how to score: clip (cosine) or pickscore (exp(logit_scale) x cosine)")
    path: str = Field(min_length=1, description="zoo:NAME, a folder (relative to this file), or a hub id")
    processor: str | None = Field(
        None, description="where tokenizer and image processor are, if not beside the weights"
    )
    revision: str | None = Field(None, description="of the hub repository")
    scale: str = Field(description="units and typical range of the score")
    licence: str = Field(description="of the weights")
    source: str = Field(description="paper, model card or command that made it")
    summary: str = Field("", description="one line for listings")


def _clip(recipe: RewardRecipe, folder: Path) -> Reward:
    from diffalign.rewards.clip import CLIPReward, PickScoreReward

    kind = {"clip": CLIPReward, "pickscore": PickScoreReward}[recipe.type.casefold()]
    return kind(
        _located(recipe.path, folder),
        name=recipe.name,
        processor=recipe.processor and _located(recipe.processor, folder),
        revision=recipe.revision,
    )


REWARD_TYPES: Registry[Callable[[RewardRecipe, Path], Reward]] = Registry("reward type")
REWARD_TYPES.register("clip")(_clip)
REWARD_TYPES.register("pickscore")(_clip)


def load(reward: str | Path | Mapping[str, Any] | RewardRecipe) -> Reward:
    """A reward by name, recipe file or recipe.

    Args:
        reward: a name that `reward_names` lists (``zoo:NAME`` too), the path of a ``.yaml`` recipe, or the recipe
            itself as a mapping; relative paths inside a mapping start from the working directory.

    Raises:
        UnknownName: no reward of that name; near misses are named.
        ValueError: the recipe is wrong; file, key and value are named.
    """
    if isinstance(reward, RewardRecipe | Mapping):
        recipe = reward if isinstance(reward, RewardRecipe) else _validated(dict(reward), "reward recipe")
        return REWARD_TYPES.get(recipe.type)(recipe, Path.cwd())
    if str(reward).endswith((".yaml", ".yml")):
        path = Path(reward).expanduser()
        return _built(read_recipe(path), path.parent)
    name = str(reward).removeprefix("zoo:")
    shipped = shipped_recipes()
    if name.casefold() in shipped:
        path = shipped[name.casefold()]
        return _built(read_recipe(path), path.parent)
    try:
        builder = REWARDS.get(name)
    except UnknownName:
        raise UnknownName("reward", str(reward), reward_names()) from None
    return builder()


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
        recipe = RewardRecipe.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r})" for e in error.errors())
        raise ValueError(f"{place}: {told}") from None
    try:
        REWARD_TYPES.get(recipe.type)
    except UnknownName as error:
        raise ValueError(f"{place}: type: {error}") from None
    return recipe


def _built(recipe: RewardRecipe, folder: Path) -> Reward:
    return REWARD_TYPES.get(recipe.type)(recipe, folder)


def _located(path: str, folder: Path) -> str | Path:
    """A shipped or local folder as a path, a hub id as it is."""
    local = resolve_data(path, relative_to=folder)
    if local.is_dir():
        return local
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return path
    raise ValueError(f"path: {path} is neither a folder (looked at {local}) nor a hub id owner/name.")
