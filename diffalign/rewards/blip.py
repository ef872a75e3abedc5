"""BLIP's image encoder and the text encoder that attends to it, from a checkpoint under BLIP's own names.

Li et al. (2022), "BLIP: Bootstrapping Language-Image Pre-training", arXiv:2201.12086.
"""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.weights import filled, within

_HEAD_WIDTH = 64  # of every ViT and BERT that BLIP is made of

# is_decoder builds the cross-attention; without these token ids, which only generation reads, any vocabulary will do
_TEXT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": True}
_TEXT |= {"bos_token_id": None, "eos_token_id": None, "sep_token_id": None}

# timm's names of a ViT, in the order of replacement, and those of transformers' `BlipVisionModel`
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


def load_blip(weights: dict[str, Tensor], place: str) -> tuple[Any, Any]:
    """(`BlipVisionModel`, `BlipTextModel` without pooler), frozen and in evaluation.

    Their sizes are those of the tensors, with heads of 64 numbers. What is fixed in BLIP's code is fixed here: exact
    GELU, and layer norms with epsilon 1e-6 for images and 1e-12 for text.

    Args:
        weights: tensors named ``visual_encoder.*`` and ``text_encoder.*``. Others, such as the projections and queues
            of the pretraining, are left out.
        place: where they are from, for messages.

    Raises:
        ValueError: a tensor lacks, is of another shape, or has no place in these networks.
    """
    ensure_torchvision()
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = {_vision_name(name): tensor for name, tensor in within(weights, "visual_encoder.").items()}
    text = within(weights, "text_encoder.")
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: older releases saved it
    try:
        vision_config = BlipVisionConfig(**_vision_sizes(vision), hidden_act="gelu", layer_norm_eps=1e-6)
        text_config = BlipTextConfig(**_text_sizes(text), **_TEXT)
    except KeyError as error:
        raise ValueError(f"{place} is no checkpoint of BLIP: it lacks what becomes {error.args[0]}") from None
    image_encoder = filled(BlipVisionModel, vision, place, config=vision_config)
    return image_encoder, filled(BlipTextModel, text, place, config=text_config, add_pooling_layer=False)


def _vision_name(name: str) -> str:
    for theirs, ours in _VISION_NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _vision_sizes(weights: dict[str, Tensor]) -> dict[str, int]:
    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return {
        "hidden_size": width,
        "intermediate_size": len(weights["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": _layers(weights, "encoder.layers."),
        "num_attention_heads": width // _HEAD_WIDTH,
        "image_size": isqrt(patches) * patch,
        "patch_size": patch,
    }


def _text_sizes(weights: dict[str, Tensor]) -> dict[str, int]:
    words, width = weights["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": words,
        "hidden_size": width,
        "encoder_hidden_size": weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": len(weights["encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": _layers(weights, "encoder.layer."),
        "num_attention_heads": width // _HEAD_WIDTH,
        "max_position_embeddings": len(weights["embeddings.position_embeddings.weight"]),
    }


def _layers(weights: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))
