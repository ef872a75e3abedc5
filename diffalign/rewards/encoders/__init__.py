"""Encoders of images and of text into one space, of which CLIP is the first."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

import torch

from diffalign.rewards.encoders.base import DualEncoder, shared, shared_features
from diffalign.rewards.encoders.huggingface import TransformersEncoder, load_model
from diffalign.rewards.encoders.open_clip import OpenCLIPEncoder

__all__ = ["DualEncoder", "OpenCLIPEncoder", "TransformersEncoder", "load_encoder", "shared", "shared_features"]

_loaded: WeakValueDictionary[tuple, DualEncoder] = WeakValueDictionary()


def load_encoder(
    path: str | Path,
    *,
    processor: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    library: str = "transformers",
) -> DualEncoder:
    """The encoder of these weights; while one is in use, the same one, so that rewards share memory and features.

    Args:
        path: a folder or hub id (transformers), or what `OpenCLIPEncoder` takes.
        processor: folder or id of tokenizer and image processor, where they are not beside the weights.
        revision: of the hub repository.
        dtype: of the weights. Embeddings are normalised and compared in float32.
        library: "transformers" or "open_clip".

    Raises:
        ValueError: the folder holds another model, lacks weights, or its tokenizer does not belong to it.
    """
    key = (library, str(path), processor and str(processor), revision, dtype)
    encoder = _loaded.get(key)
    if encoder is None:
        if library == "open_clip":
            encoder = OpenCLIPEncoder(str(path), dtype)
        else:
            model = load_model(str(path), revision, dtype)
            source, of = (str(path), revision) if processor is None else (str(processor), None)
            encoder = TransformersEncoder(model, source, of, Path(path).name)
        _loaded[key] = encoder
    return encoder
