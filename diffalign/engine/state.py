"""Nested state on disk without pickle: tensors in safetensors, everything else in JSON, read back exactly as it was."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tree = Any
"""A tensor, a JSON scalar (None, bool, int, float, str), or a dict (str or int keys), list or tuple of trees."""


def save_tree(folder: str | Path, tree: Tree) -> None:
    """Write `tree` to `folder/tensors.safetensors` and, after it, `folder/state.json`.

    An optimizer's `state_dict()` (integer keys, tuples of betas) is a tree; so is one nested in another.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    layout = _flatten(tree, "", tensors)
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(layout), encoding="utf-8")


def load_tree(folder: str | Path) -> Tree:
    """Read what `save_tree` wrote; tensors come back on the CPU."""
    folder = Path(folder)
    layout = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return _restore(layout, load_file(folder / "tensors.safetensors"))


def _flatten(node: Tree, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        # The number keeps names unique when keys hold slashes; the clone keeps views of one storage apart.
        name = f"{len(tensors)}:{path}"
        tensors[name] = node.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(node, dict):
        if not all(type(key) in (str, int) for key in node):
            raise TypeError(f"keys at '{path}' must be str or int")
        return {"dict": [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in node.items()]}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]}
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise TypeError(f"cannot save {type(node).__name__} at '{path}': only tensors, JSON scalars, dict, list, tuple")


def _restore(layout: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if not isinstance(layout, dict):
        return layout
    ((kind, value),) = layout.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _restore(child, tensors) for key, child in value}
    children = [_restore(child, tensors) for child in value]
    return tuple(children) if kind == "tuple" else children
