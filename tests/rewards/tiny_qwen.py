"""Tiny random rewards of Qwen2-VL in their published layout: old names, old config, the authors' added tokens."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign._compat import ensure_torchvision
from diffalign.rewards.qwen_rewards import hpsv3_template, video_template
from tests.rewards.tiny_vlm import save_tokenizer

HEAD_SIZES = (32, 20, 6, 2)
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def save_base(folder: Path) -> Path:
    """Everything of a Qwen2-VL repository but its weights, the config as its authors wrote it in 2024."""
    ensure_torchvision()
    tokenizer = save_tokenizer(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").unlink()  # of the tokenizer that all tiny models share
    # A line of the instructions becomes one token, for speed: of letters they are thousands.
    instructions = (hpsv3_template.TEMPLATE + video_template.TEMPLATE).splitlines()
    tokenizer.add_tokens(sorted({line for line in instructions if "{" not in line and "<|" not in line and line}))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_window_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768, "hidden_act": "silu"}
    text |= {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    text |= {"sliding_window": 32768, "use_sliding_window": False, "attention_dropout": 0.0}
    vision = {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 32}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    ids = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for key, word in ids.items()}
    config = text | ids | {"model_type": "qwen2_vl", "vocab_size": len(tokenizer) + 40, "vision_config": vision}
    config |= {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def random_model(base: Path, words: int, seed: int = 0):
    """A `Qwen2VLModel` of the base's sizes that knows so many words, its rotary frequencies rounded as the authors'."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = words
    torch.manual_seed(seed)
    model = Qwen2VLModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # away from the near-constant network of the initialisation
    for module in (model.visual.rotary_pos_emb, model.language_model.rotary_emb):
        module.inv_freq.copy_(module.inv_freq.bfloat16())
    return model


def published(model) -> dict[str, torch.Tensor]:
    """The model's weights as transformers 4.45 named those of a `Qwen2VLForConditionalGeneration`."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name.replace("language_model.", "model.", 1)] = tensor.detach().clone()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights


def save_hpsv3(folder: Path) -> Path:
    """HPSv3.safetensors and the folder of its base."""
    base = save_base(folder / "base")
    weights = published(random_model(base, words_of(base) + 1))
    generator = torch.Generator().manual_seed(1)
    for number, outs, ins in zip((0, 3, 5), HEAD_SIZES[1:], HEAD_SIZES, strict=False):
        weights[f"rm_head.{number}.weight"] = torch.randn(outs, ins, generator=generator) * ins**-0.5
        weights[f"rm_head.{number}.bias"] = torch.randn(outs, generator=generator) * 0.1
    save_file(weights, folder / "HPSv3.safetensors")
    return folder


def words_of(base: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(base))


MODEL_CONFIG = {
    "data_config": {
        "meta_data": "x.csv",
        "data_dir": "x",
        "max_frame_pixels": 448 * 448,
        "num_frames": None,
        "fps": 2.0,
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "lora_r": 3, "lora_alpha": 6, "use_rslora": False},
    "inference_config": {"VQ_mean": 3.0, "VQ_std": 2.0, "MQ_mean": 1.0, "MQ_std": 1.5, "TA_mean": 2.0, "TA_std": 0.5},
}


def save_video_reward(folder: Path, outputs: int = 1) -> Path:
    """checkpoint-7/model.pth with an adapter of rank 3 on the language model, model_config.json, the base's folder."""
    base = save_base(folder / "base")
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, tensor in published(random_model(base, words_of(base) + 3)).items():
        if name.startswith("model.layers.") and name.endswith(("proj.weight", "proj.bias")):
            module, kind = name.rsplit(".", 1)
            if kind == "weight":
                outs, ins = tensor.shape
                weights[f"{module}.lora_A.default.weight"] = torch.randn(3, ins, generator=generator) * ins**-0.5
                weights[f"{module}.lora_B.default.weight"] = torch.randn(outs, 3, generator=generator) * 0.05
            name = f"{module}.base_layer.{kind}"
        weights[name] = tensor
    weights["rm_head.weight"] = torch.randn(outputs, 32, generator=generator)
    (folder / "checkpoint-7").mkdir()
    weights = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    torch.save(weights, folder / "checkpoint-7" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps(MODEL_CONFIG))
    return folder
