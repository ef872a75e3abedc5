"""A tiny random MJ-VIDEO in its published layout: InternVL2's own names, its config of 2024, a sentencepiece model."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign._compat import ensure_torchvision
from diffalign.rewards.mj_video.template import START

WORDS = [
    "ass",
    "istant",
    "user",
    "system",
    "Frame",
    "image",
    "cat",
    "dogs",
    "▁a",
    "▁cat",
    "▁two",
    "▁dogs",
    "▁▁",
    "circle",
]
RESERVED = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
ADDED = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
KEYS, GROUPS, WIDTH = 2, 2, 8  # key heads, query heads of each, numbers of a head
CONFIG = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 56,
    "max_dynamic_patch": 12,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": KEYS * GROUPS * WIDTH,
        "intermediate_size": 48,
        "max_position_embeddings": 4096,
        "num_attention_heads": KEYS * GROUPS,
        "num_hidden_layers": 2,
        "num_key_value_heads": KEYS,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
    },
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 24,
        "image_size": 56,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
        "use_flash_attn": False,
    },
}


def save_base(folder: Path) -> Path:
    """What is read of InternVL2-2B: config.json, tokenizer.model, tokenizer_config.json."""
    folder.mkdir()
    marks = dict.fromkeys(range(3), "") | {0: "<unk>", 1: "<s>", 2: "</s>"}
    first = save_pieces(folder / "tokenizer.model")
    marks |= {first + number: mark for number, mark in enumerate(RESERVED + ADDED)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {str(index): {"content": mark} | plain for index, mark in marks.items()}
    kept = {"added_tokens_decoder": tokens, "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>"}
    kept |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    kept |= {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    config = CONFIG | {"llm_config": CONFIG["llm_config"] | {"vocab_size": first + len(RESERVED + ADDED)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_pieces(path: Path) -> int:
    """A sentencepiece model of bytes, letters and the words, and of places kept free; the id of the first of those."""
    ensure_torchvision()
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    kinds |= dict.fromkeys("▁\n:" + "".join(map(chr, range(97, 123))) + "FARB0123456789", 1)
    for word in WORDS:
        kinds |= {word[:end]: 1 for end in range(2, len(word) + 1)}
    kinds["[blank]"] = 4  # of the user's own
    sentence = START.partition("\n")[2].removesuffix("<|im_end|>")
    kinds |= {sentence[:2]: 1} | dict.fromkeys(sentence[:2], 1)
    first = len(kinds)
    kinds |= {f"[UNUSED_TOKEN_{number}]": 5 for number in range(len(RESERVED))}
    for rank, (piece, kind) in enumerate(kinds.items()):
        proto.pieces.add(piece=piece, score=-float(rank), type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", False
    proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())
    return first


def random_model(base: Path, seed: int = 0):
    """An `InternVLModel` of the base's sizes."""
    ensure_torchvision()
    from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, LlamaConfig

    tree = json.loads((base / "config.json").read_text())
    text, vision = tree["llm_config"], tree["vision_config"]
    text = {key: value for key, value in text.items() if key not in ("architectures", "model_type", "rope_scaling")}
    wanted = {key: vision[key] for key in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
    wanted |= {"num_hidden_layers": 2, "num_attention_heads": 3, "attention_bias": True, "layer_norm_eps": 1e-6}
    image_token = text["vocab_size"] - len(ADDED) + 2
    parts = {"vision_config": InternVLVisionConfig(**wanted), "text_config": LlamaConfig(**text)}
    torch.manual_seed(seed)
    model = InternVLModel(InternVLConfig(**parts, image_token_id=image_token)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # away from the near-constant network of the initialisation, and from biases and norms that do nothing
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.2))
            if name.endswith(("norm.weight", "before.weight", "after.weight")) or "lambda" in name:
                parameter.add_(1)
    return model


OLD_NAMES = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.encoder.layer": "vision_model.encoder.layers",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "language_model": "language_model.model",
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def published(model) -> dict[str, torch.Tensor]:
    """The model's weights under the names of InternVL2's own code, queries, keys and values joined as there."""
    state, weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}, {}
    for name, tensor in state.items():
        joined = tensor
        if ".q_proj." in name and "vision" in name:
            joined = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        elif ".q_proj." in name:
            keys, values = (state[name.replace("q_proj", f"{x}_proj")] for x in "kv")
            rows = []
            for head in range(KEYS):
                rows.append(tensor[head * GROUPS * WIDTH : (head + 1) * GROUPS * WIDTH])
                rows += [part[head * WIDTH : (head + 1) * WIDTH] for part in (keys, values)]
            joined, name = torch.cat(rows), name.replace("self_attn.q_proj", "attention.wqkv")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        weights[name] = joined
    weights["language_model.output.weight"] = torch.randn_like(weights["language_model.model.tok_embeddings.weight"])
    return weights


def save_mj_video(folder: Path) -> Path:
    """model.safetensors and the folder of its base."""
    base = save_base(folder / "base")
    weights = {f"model.{name}": tensor for name, tensor in published(random_model(base)).items()}
    generator = torch.Generator().manual_seed(1)
    width = KEYS * GROUPS * WIDTH
    weights["regression_layer.weight"] = torch.randn(28, width, generator=generator) * width**-0.5
    weights["reward_transform_matrix"] = torch.eye(28) + 0.01 * torch.randn(28, 28, generator=generator)
    for gate, outputs in (("aspect", 5), ("criteria", 28)):
        sizes = (width, 20, 20, 20, outputs)
        for number, (ins, outs) in enumerate(pairwise(sizes)):
            name = f"{gate}_gating.layers.{number}"
            weights[f"{name}.weight"] = torch.randn(outs, ins, generator=generator) * (2 / ins) ** 0.5
            weights[f"{name}.bias"] = torch.randn(outs, generator=generator) * 0.1
        weights[f"{gate}_gating.logit_scale"] = torch.tensor([1.0 + 0.1 * outputs])
    save_file(weights, folder / "model.safetensors")
    return folder
