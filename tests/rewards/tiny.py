"""Tiny random models of real classes in folders, as their checkpoints lie."""

import string

import torch

from diffalign._compat import ensure_torchvision

LETTERS = sorted(set("a red green blue circle square two one big small left of right above the") - {" "})


def write_clip(folder, projection_dim=16):
    """A random CLIPModel of real classes, a tokenizer of 16 tokens and a processor of 32 pixels."""
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    symbols = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = tower | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from the near-constant network of the initialisation
    model.save_pretrained(folder)
    return folder


def write_siglip(folder):
    """A random SiglipModel with Gemma's tokenizer, which here knows lower-case letters only, and 20 of them at most."""
    ensure_torchvision()
    from transformers import GemmaTokenizer, SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_lowercase]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=20).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(vocabulary), "max_position_embeddings": 20, "projection_size": 32}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8})
    model = SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def published_head(width, seed=0):
    """An aesthetic head of five layers under the names of the published one."""
    random = torch.Generator().manual_seed(seed)
    sizes = {"layers.0": (12, width), "layers.2": (8, 12), "layers.4": (4, 8), "layers.6": (3, 4), "layers.7": (1, 3)}
    weights = {f"{name}.weight": torch.randn(size, generator=random) for name, size in sizes.items()}
    return weights | {f"{name}.bias": torch.randn(size[0], generator=random) for name, size in sizes.items()}


def write_hps(base, file):
    """The base with other weights, in the layout in which HPSv2 was published; returns the model."""
    from transformers import CLIPModel

    from diffalign.zoo.open_clip_export import state_dict

    model = CLIPModel.from_pretrained(base)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    torch.save({"state_dict": state_dict(model), "epoch": 1}, file)
    return model.eval()


def mps_cross_weights(width=128, layers=2, seed=0):
    """Under the names, and with the buffers, of the published module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.fn.norm.weight": (width,), "1.fn.norm.weight": (width,), "0.fn.ff.0.weight": (8 * width, width)}
    shapes |= {
        "0.fn.to_q.weight": (width, width),
        "0.fn.to_kv.weight": (128, width),
        "1.fn.attn_out.weight": (width, width),
    }
    shapes |= {"0.fn.to_out.weight": (width, width), "0.fn.ff.2.weight": (width, 4 * width)}
    shapes |= {"1.fn.fused_attn_ff_proj.weight": (9 * width + 128, width), "1.fn.ff_out.1.weight": (width, 4 * width)}
    weights = {}
    for layer in (f"cross_model.layers.{number}" for number in range(layers)):
        for name, shape in shapes.items():
            weights[f"{layer}.{name}"] = torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5
        weights |= {f"{layer}.{number}.fn.norm.bias": torch.zeros(width) for number in (0, 1)}
        weights[f"{layer}.1.fn.rotary_emb.inv_freq"] = 1 / 10_000 ** (torch.arange(0, 64, 2) / 64)
    return weights


def write_mps(base, file):
    """The base's tensors with a cross-attention under the names of the published modules; returns the file."""
    from transformers import CLIPModel

    weights = {f"model.{name}": tensor for name, tensor in CLIPModel.from_pretrained(base).state_dict().items()}
    weights["model.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(weights | mps_cross_weights(), file)
    return file
