"""A tiny random vision-language model of real classes, with a byte-level tokenizer that knows the words of a judge."""

import json
from pathlib import Path

import torch

from diffalign._compat import ensure_torchvision
from diffalign.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD

WORDS = ["Yes", "No", "yes", "no", " Yes", " No", "YES"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}THINKS{% endif %}{% endif %}"
)


def byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def save_tokenizer(folder: Path):
    """A `Qwen2Tokenizer` of 256 bytes, the words and the special tokens."""
    from transformers import Qwen2Tokenizer

    pieces, merges = byte_letters(), []
    for word in WORDS:
        symbol = word.replace(" ", "Ġ")
        for end in range(2, len(symbol) + 1):
            if symbol[:end] not in pieces:
                pieces.append(symbol[:end])
                merges.append((symbol[: end - 1], symbol[end - 1]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {token: len(pieces) + index for index, token in enumerate(SPECIAL)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def config_of(kind: str, tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": 0}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for name, word in MARKS.items()}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    if kind == "qwen3_vl":
        vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **ids)
    vision |= {"window_size": 56}
    vision |= {"fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


MARKS = {
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}


def save_vlm(folder: Path, kind: str = "qwen2_5_vl") -> Path:
    """Weights, tokenizer and processor of a random model that answers with one of the words, digits and the like."""
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(kind, tokenizer))
    words = [tokenizer.convert_tokens_to_ids(word.replace(" ", "Ġ")) for word in [*WORDS, *"12345"]]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # away from the near-constant network of the initialisation
        head = model.get_output_embeddings().weight
        kept = head[words].clone()
        head.zero_()
        head[words] = kept * 2
    model.save_pretrained(folder)
    pixels = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    pixels |= {"image_mean": list(OPENAI_MEAN), "image_std": list(OPENAI_STD), "rescale_factor": 1 / 255}
    pixels |= {"merge_size": 2, "patch_size": 16 if kind == "qwen3_vl" else 14, "temporal_patch_size": 2}
    image = {"image_processor_type": "Qwen2VLImageProcessor"}
    image |= {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}}
    whole, video = PROCESSORS[kind]
    # Written by hand: making a video processor needs torchvision.
    config = {"image_processor": pixels | image, "processor_class": whole}
    config["video_processor"] = pixels | {"video_processor_type": video}
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


PROCESSORS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def spelt_inputs(folder: Path, image, question: str, token: str = "<|image_pad|>"):
    """What a Qwen-VL model reads of a question about an image, by transformers' image processor and tokenizer."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")([image], return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    text = text.replace(token, token * int(pixels["image_grid_thw"].prod() // 4))
    inputs = dict(tokenizer(text, return_tensors="pt")) | dict(pixels)
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(token)).int()}


def save_llava(folder: Path) -> Path:
    """A random LLaVA: a model of another family, whose images go through its own processor."""
    ensure_torchvision()
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = save_tokenizer(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14} | tower,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer)} | tower,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder
