"""Published weights of Qwen2-VL reward models, in the names of today's transformers; low-rank adapters stay apart."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.weights import filled

_ADAPTER = re.compile(r"(.+)\.lora_A\.default\.weight")


def split_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone as `Qwen2VLModel` names it, head), from ``visual.*``, ``model.*``, ``lm_head.*`` and ``rm_head.*``.

    These are the names of transformers 4.45, by which both models are published, with peft's ``base_model.model.``
    before them where an adapter was saved; the names of later releases are read too. The output layer ``lm_head`` is
    left out, for no reward reads words.
    """
    backbone, head = {}, {}
    for name, tensor in weights.items():
        name = name.removeprefix("base_model.model.")
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor
        elif name.startswith("lm_head."):
            continue
        elif name.startswith(("model.visual.", "model.language_model.")):
            backbone[name.removeprefix("model.")] = tensor
        elif name.startswith("model."):
            backbone["language_model." + name.removeprefix("model.")] = tensor
        else:
            backbone[name] = tensor
    return backbone, head


def load_backbone(
    weights: dict[str, Tensor], config: Any, place: str, dtype: torch.dtype, lora: dict[str, Any] | None = None
) -> Any:
    """A frozen `Qwen2VLModel` with these weights.

    Adapters are not merged: their updates are smaller than what bfloat16 tells apart. They stay in float32, as in the
    authors' code, and rotary frequencies in float32 too, rounded to bfloat16: with such both models were trained.

    Args:
        weights: as `split_weights` gives them.
        config: `Qwen2VLConfig`; its number of words is overwritten by the checkpoint's.
        place: where they are from, for messages.
        dtype: of the weights.
        lora: peft's ``lora_alpha`` and ``use_rslora``, where the checkpoint has an adapter.

    Raises:
        ValueError: a tensor lacks, is of another shape, or has no place in the network.
    """
    words = weights.get("language_model.embed_tokens.weight")
    if words is None:
        raise ValueError(f"{place} is no checkpoint of a Qwen2-VL reward: it has no model.embed_tokens.weight")
    config.text_config.vocab_size = len(words)
    weights = {name: tensor.float() if ".lora_" in name else tensor.to(dtype) for name, tensor in weights.items()}
    adapted = {found[1]: len(weights[name]) for name in weights if (found := _ADAPTER.fullmatch(name))}

    def qwen2_vl() -> Any:
        from transformers import Qwen2VLModel

        model = Qwen2VLModel(config)
        return _with_adapters(model, adapted, lora or {}) if adapted else model

    model = filled(qwen2_vl, weights, place)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    return model


def _with_adapters(model: Any, ranks: dict[str, int], lora: dict[str, Any]) -> Any:
    """The model with empty adapters on the modules of these names."""
    from peft import LoraConfig, inject_adapter_in_model

    how = {"r": next(iter(ranks.values())), "rank_pattern": ranks, "lora_dropout": 0.0, "bias": "none"}
    return inject_adapter_in_model(LoraConfig(target_modules=list(ranks), **how, **lora), model)
