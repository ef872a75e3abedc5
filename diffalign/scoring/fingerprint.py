"""What a score was made with: the recipe, the class and the weights of a reward, as one hash."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.recipe_file import parse_yaml
from diffalign.rewards import FunctionReward, Reward
from diffalign.rewards.recipe import recipe_path

_COUNTERS = {"truncated_prompts"}  # attributes that change while a reward scores
_DEPTH = 8  # of objects in objects, which may hold each other


def fingerprint(reward: Reward, source: str | Path | None = None) -> str:
    """A sha256 that differs where scores may differ.

    It covers the recipe, the source text of the class or function, plain attributes and every weight, also those of
    encoders and of the members of a combination. What the source text calls in other modules is not covered.

    Args:
        reward: as it will score.
        source: the name or file that `rewards.load` made it of.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_recipe(source), sort_keys=True).encode())
    for part in _parts(reward, "reward"):
        digest.update(part)
    return digest.hexdigest()


def _recipe(source: str | Path | None) -> Any:
    if source is None:
        return None
    path = recipe_path(source, Path.cwd())
    return str(source) if path is None else parse_yaml(path.read_text(encoding="utf-8"), str(path))


def _parts(value: Any, name: str, packages: frozenset[str] = frozenset(), depth: int = 0) -> Iterator[bytes]:
    """Bytes that say what a value is.

    Objects of this package and of the reward's own are looked into; what a library made, such as a tokenizer, says
    nothing that stays the same, and is left out unless it is a module with weights.
    """
    if isinstance(value, nn.Module):
        for key, tensor in sorted(value.state_dict().items()):
            yield from _parts(tensor, f"{name}.{key}")
    elif isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        yield f"{name} {array.dtype} {tuple(array.shape)}".encode()
        if array.numel():
            yield hashlib.sha256(array.flatten().view(torch.uint8).numpy()).digest()
    elif isinstance(value, str | int | float | None):
        yield f"{name} {value!r}".encode()
    elif depth > _DEPTH:
        return
    elif isinstance(value, list | tuple | dict):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parts(inner, f"{name}.{key}", packages, depth + 1)
    elif isinstance(value, Reward) or _package(value) in packages:
        packages |= {"diffalign", _package(value)}
        own = value.function if isinstance(value, FunctionReward) else type(value)
        yield f"{name} {type(value).__qualname__} {getattr(value, 'needs', '')} {_source(own)}".encode()
        for key, inner in sorted(getattr(value, "__dict__", {}).items()):
            if not key.startswith("_") and key not in _COUNTERS:
                yield from _parts(inner, f"{name}.{key}", packages, depth + 1)


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed in, or compiled
        return getattr(thing, "__qualname__", type(thing).__qualname__)
