"""What a recipe says otherwise than the one that a folder was begun with."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from diffalign.config import resolved
from diffalign.settings import Settings


def changes(recipe: Settings, config: Path, beside: Collection[str]) -> list[str]:
    """A clause for each setting, and each file that the recipe names, that is not as in `config`.

    Args:
        recipe: as it is now, of either kind.
        config: the folder's config.yaml, by `write_resolved`.
        beside: keys that may differ; versions of libraries always may.
    """
    before, now = _leaves(yaml.safe_load(config.read_text(encoding="utf-8"))), _leaves(resolved(recipe))
    return [
        f"the file of {key.removeprefix('recorded.sha256.')} has changed"
        if key.startswith("recorded.")
        else f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}"
        for key in before | now
        if before.get(key) != now.get(key) and key not in beside and not key.startswith("recorded.versions")
    ]


def _leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """Key -> value of everything in a tree that is no mapping."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, each in tree.items() for k, v in _leaves(each, f"{key}.{name}" if key else name).items()}
