"""Weights of InternVL2 on InternLM2 in the names of transformers' `InternVLModel`; and its sizes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.weights import filled

_READ = {"template": "internlm2-chat", "ps_version": "v2", "select_layer": -1}  # of a config.json
_NAMES = (
    (r"vision_model\.embeddings\.class_embedding", "vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (r"vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"language_model\.model\.", "language_model."),
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)


def load_backbone(
    weights: dict[str, Tensor], tree: dict[str, Any], image_token: int, place: str, dtype: torch.dtype
) -> Any:
    """A frozen `InternVLModel` with these weights.

    Args:
        weights: under the names of InternVL2's own code; the output layer is left out, for no reward reads words.
        tree: its ``config.json``.
        image_token: id of the token in whose places the image stands.
        place: where the weights are from, for messages.
        dtype: of the weights.

    Raises:
        ValueError: it is another kind of model, or a tensor lacks, is of another shape, or has no place in it.
    """
    from transformers import InternVLModel

    config = read_config(tree, image_token, place)
    groups = config.text_config.num_attention_heads // config.text_config.num_key_value_heads
    width = config.text_config.hidden_size // config.text_config.num_attention_heads
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("language_model.output."):
            named |= _renamed(name, tensor.to(dtype), groups, width)
    return filled(InternVLModel, named, place, config=config)


def _renamed(name: str, tensor: Tensor, groups: int, width: int) -> dict[str, Tensor]:
    """One tensor under its new name, or the three of a joint projection to queries, keys and values."""
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    if ".attn.qkv." in name:  # all queries, all keys, all values
        parts = tensor.chunk(3)
        return {name.replace("attn.qkv", f"attention.{x}_proj"): p for x, p in zip("qkv", parts, strict=True)}
    if ".attention.wqkv." in name:  # for each key head its queries, itself and its value
        heads = tensor.unflatten(0, (-1, groups + 2, width))
        parts = heads[:, :groups], heads[:, -2], heads[:, -1]
        rows = (part.reshape(-1, *tensor.shape[1:]) for part in parts)
        return {name.replace("attention.wqkv", f"self_attn.{x}_proj"): p for x, p in zip("qkv", rows, strict=True)}
    return {name: tensor}


def read_config(tree: dict[str, Any], image_token: int, place: str) -> Any:
    """`InternVLConfig` from the dictionary of an InternVL2's ``config.json``. ValueError where it is another kind."""
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

    try:
        text, vision = tree["llm_config"], tree["vision_config"]
        scaling = (text.get("rope_scaling") or {"type": "dynamic"})["type"]
        found = {key: tree[key] for key in _READ} | {"llm": text["architectures"][0], "rope_scaling": scaling}
        for key, wanted in (_READ | {"llm": "InternLM2ForCausalLM", "rope_scaling": "dynamic"}).items():
            if found[key] != wanted:
                raise ValueError(f"{place}: {key} of its base is {found[key]!r}, and only {wanted!r} is read here.")
        return InternVLConfig(
            vision_config=InternVLVisionConfig(**_vision(vision, tree.get("force_image_size"))),
            text_config=LlamaConfig(**_text(text)),
            image_token_id=image_token,
            downsample_ratio=tree["downsample_ratio"],
            tie_word_embeddings=False,
        )
    except KeyError as error:
        raise ValueError(f"config.json of the base of {place} lacks {error.args[0]}: it is no InternVL2's.") from None


def _vision(tree: dict[str, Any], size: int | None) -> dict[str, Any]:
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type")
    return {key: tree[key] for key in (*same, "layer_norm_eps", "patch_size")} | {
        "image_size": size or tree["image_size"],
        "attention_bias": tree["qkv_bias"],
        "use_qk_norm": tree["qk_normalization"],
    }


def _text(tree: dict[str, Any]) -> dict[str, Any]:
    """InternLM2 is Llama with other names. Its rotary angles are scaled only past ``max_position_embeddings``."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act", "rope_theta")
    return {key: tree[key] for key in (*same, *more)} | {"attention_bias": tree["bias"]}
