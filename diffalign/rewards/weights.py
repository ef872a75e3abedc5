"""Published checkpoints: as tensors, safetensors or torch's own files under its restricted reader, and as networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def find_weights(path: str, revision: str | None = None) -> Path:
    """A local file as it is, or ``OWNER/NAME/FILE`` fetched from the hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(path).is_file():
        return Path(path)
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/([\w./+-]+\.(?:safetensors|pt|pth|bin))", path)
    if named is None:
        raise FileNotFoundError(f"{path} is neither a file nor OWNER/NAME/FILE of a repository on the hub")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(named[1], named[2], revision=revision))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU; of one that is wrapped in "state_dict" or "model", those inside.

    Several reward models were published as torch files only. Those are read with ``weights_only=True``, torch's
    restricted reader, which builds tensors and plain containers and refuses everything else.

    Raises:
        ValueError: the file holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises UnpicklingError, RuntimeError, EOFError, KeyError, ...
        raise ValueError(
            f"{path} is no checkpoint of plain tensors ({type(error).__name__}): it was not read"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ValueError(f"{path} holds more than named tensors: it is no checkpoint of weights")
    return tree


def within(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def filled(kind: type, weights: dict[str, Tensor], place: str, **how: Any) -> Any:
    """A ``kind(**how)`` that has the weights for its own without a second copy, frozen and in evaluation.

    Raises:
        ValueError: a tensor lacks, is of another shape, or has no place in the network.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = kind(**how)
    wanted = {name: empty.shape for name, empty in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{place} is no checkpoint of a {kind.__name__}: {len(wrong)} of its weights lack, are too many or differ "
            f"in shape, such as {name}, {_shape(found.get(name))} for {_shape(wanted.get(name))}"
        )
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def pretrained(kind: Any, path: str, revision: str | None, dtype: torch.dtype, **parts: Any) -> Any:
    """The network of a folder or hub id, frozen and in evaluation; safetensors only.

    Args:
        kind: a class of transformers that has `from_pretrained`.
        path: the folder or hub id.
        revision: of the hub repository.
        dtype: of the weights.
        **parts: arguments of the network's class.

    Raises:
        ValueError: the checkpoint lacks weights, which transformers would draw at random.
    """
    model, info = kind.from_pretrained(
        path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True, **parts
    )
    if absent := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(absent)} weights of a {type(model).__name__}, such as {absent[0]}: it is another model."
        )
    return model.requires_grad_(False).eval()


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "a scalar"
