"""Write a transformers CLIPModel as open_clip reads it (`local-dir:FOLDER`), with equal features."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from diffalign.zoo.text import LENGTH

MEAN_AND_STD = 0.5  # of each channel: pixels in [0, 1] become [-1, 1]


def state_dict(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights of `model` under open_clip's names."""
    source = model.state_dict()
    target = {"logit_scale": source["logit_scale"]}
    embeddings = "text_model.embeddings"
    target["token_embedding.weight"] = source[f"{embeddings}.token_embedding.weight"]
    target["positional_embedding"] = source[f"{embeddings}.position_embedding.weight"]
    target["text_projection"] = source["text_projection.weight"].T
    embeddings = "vision_model.embeddings"
    target["visual.class_embedding"] = source[f"{embeddings}.class_embedding"]
    target["visual.conv1.weight"] = source[f"{embeddings}.patch_embedding.weight"]
    target["visual.positional_embedding"] = source[f"{embeddings}.position_embedding.weight"]
    target["visual.proj"] = source["visual_projection.weight"].T
    for kind in ("weight", "bias"):
        target[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        target[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        target[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
    for tower, prefix in (("text", ""), ("vision", "visual.")):
        for i in range(getattr(model.config, f"{tower}_config").num_hidden_layers):
            block = f"{prefix}transformer.resblocks.{i}"
            target |= _block(source, f"{tower}_model.encoder.layers.{i}", block)
    return {name: tensor.contiguous() for name, tensor in target.items()}


def _block(source: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    block = {}
    for kind in ("weight", "bias"):
        for a, b in names.items():
            block[f"{new}.{b}.{kind}"] = source[f"{old}.{a}.{kind}"]
        joined = [source[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
        block[f"{new}.attn.in_proj_{kind}"] = torch.cat(joined)
    return block


def config(model: CLIPModel) -> dict:
    """The content of `open_clip_config.json`; the tokenizer is the one saved in the same folder."""
    vision, text = model.config.vision_config, model.config.text_config
    return {
        "model_cfg": {
            "embed_dim": model.config.projection_dim,
            "quick_gelu": False,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.hidden_size,
                "layers": vision.num_hidden_layers,
                "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            "text_cfg": {
                "context_length": LENGTH,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "hf_tokenizer_name": "shapes-clip",  # any name: open_clip then looks beside this file
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
        },
        "preprocess_cfg": {
            "mean": [MEAN_AND_STD] * 3,
            "std": [MEAN_AND_STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def write(model: CLIPModel, folder: Path) -> None:
    """`open_clip_config.json` and `open_clip_model.safetensors`, in half precision (open_clip computes in single)."""
    weights = {name: tensor.half() for name, tensor in state_dict(model).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config(model), indent=2) + "\n", encoding="utf-8")
