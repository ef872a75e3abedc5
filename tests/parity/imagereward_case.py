"""A random checkpoint in ImageReward's published layout, and a folder that `imagereward.py` compares scores on.

    python -m tests.parity.imagereward_case FOLDER [--full]

writes ImageReward.pt, med_config.json, bert-base-uncased/vocab.txt, images, and case.json with our scores; --full has
the published sizes (446 million weights, a file of 1.8 GB).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "red", "circle", "blue", "square", ",", "two"]
PROMPTS = [
    "a red circle",
    "Two blue squares, zzz",
    "a square",
    "",
    "red circles, " * 20,  # past the 35 tokens
    "café ∆ red",
]
SHAPES = [(224, 224), (97, 333), (303, 200), (512, 387), (61, 40), (229, 512)]


@dataclass(frozen=True)
class Sizes:
    """The published ones are in `FULL`."""

    image: int = 32
    patch: int = 8
    vision_width: int = 192
    vision_layers: int = 2
    text_width: int = 128
    text_layers: int = 2
    words: int = len(WORDS) + 2  # with [DEC] and [ENC]


FULL = Sizes(image=224, patch=16, vision_width=1024, vision_layers=24, text_width=768, text_layers=12, words=30524)


def random_checkpoint(sizes=None, seed=0):
    """Every tensor of a published checkpoint, random; its small embeddings tell one epsilon of a norm from another."""
    sizes = sizes or Sizes()
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def draw(name, *shape, std=None):
        weights[name] = torch.randn(shape, generator=generator) * (std or shape[-1] ** -0.5)

    def linear(name, ins, outs):
        draw(f"{name}.weight", outs, ins)
        draw(f"{name}.bias", outs, std=0.1)

    def norm(name, width):
        draw(f"{name}.weight", width, std=0.1)
        weights[f"{name}.weight"] += 1
        draw(f"{name}.bias", width, std=0.1)

    wide, patches = sizes.vision_width, (sizes.image // sizes.patch) ** 2
    draw("blip.visual_encoder.cls_token", 1, 1, wide, std=0.02)
    draw("blip.visual_encoder.pos_embed", 1, patches + 1, wide, std=0.02)
    draw("blip.visual_encoder.patch_embed.proj.weight", wide, 3, sizes.patch, sizes.patch, std=0.02 / sizes.patch)
    draw("blip.visual_encoder.patch_embed.proj.bias", wide, std=0.02)
    for block in (f"blip.visual_encoder.blocks.{number}" for number in range(sizes.vision_layers)):
        norm(f"{block}.norm1", wide)
        linear(f"{block}.attn.qkv", wide, 3 * wide)
        linear(f"{block}.attn.proj", wide, wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.mlp.fc1", wide, 4 * wide)
        linear(f"{block}.mlp.fc2", 4 * wide, wide)
    norm("blip.visual_encoder.norm", wide)
    width = sizes.text_width
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    draw("blip.text_encoder.embeddings.word_embeddings.weight", sizes.words, width, std=0.02)
    draw("blip.text_encoder.embeddings.position_embeddings.weight", 512, width, std=0.01)
    norm("blip.text_encoder.embeddings.LayerNorm", width)
    for layer in (f"blip.text_encoder.encoder.layer.{number}" for number in range(sizes.text_layers)):
        for attention, source in (("attention", width), ("crossattention", wide)):
            linear(f"{layer}.{attention}.self.query", width, width)
            linear(f"{layer}.{attention}.self.key", source, width)
            linear(f"{layer}.{attention}.self.value", source, width)
            linear(f"{layer}.{attention}.output.dense", width, width)
            norm(f"{layer}.{attention}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", width, 4 * width)
        linear(f"{layer}.output.dense", 4 * width, width)
        norm(f"{layer}.output.LayerNorm", width)
    linear("blip.vision_proj", wide, 256)
    linear("blip.text_proj", width, 256)
    for number, ins, outs in ((0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{number}", ins, outs)
    return weights


def write_tokenizer(folder):
    """A folder with BERT's kind of vocabulary: every letter, some words."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def pictures(shapes=SHAPES, seed=0):
    """RGB images with a hard edge, of (height, width) each."""
    generator = np.random.default_rng(seed)
    for height, width in shapes:
        rows, columns = np.mgrid[0:height, 0:width]
        disc = (
            (rows - generator.integers(height)) ** 2 + (columns - generator.integers(width)) ** 2
        ) < height * width / 9
        colour, ground = generator.integers(0, 256, (2, 3))
        noise = generator.integers(-20, 20, (height, width, 3))
        yield Image.fromarray((np.where(disc[..., None], colour, ground) + noise).clip(0, 255).astype(np.uint8))


def write_case(folder, sizes=None):
    """Everything that the published code needs to score the same, and our scores."""
    from diffalign import media
    from diffalign.rewards.imagereward import ImageReward

    sizes, folder = sizes or Sizes(), Path(folder)
    write_tokenizer(folder / "bert-base-uncased")
    torch.save(random_checkpoint(sizes), folder / "ImageReward.pt")
    text = {"hidden_size": sizes.text_width, "num_attention_heads": sizes.text_width // 64, "vocab_size": sizes.words}
    text |= {"intermediate_size": 4 * sizes.text_width, "num_hidden_layers": sizes.text_layers, "hidden_act": "gelu"}
    text |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 0, "type_vocab_size": 2}
    (folder / "med_config.json").write_text(json.dumps(text | {"add_cross_attention": True}))
    reward = ImageReward(folder / "ImageReward.pt", tokenizer=folder / "bert-base-uncased")
    rows = []
    for number, (picture, prompt) in enumerate(zip(pictures(), PROMPTS, strict=True)):
        picture.save(folder / f"{number}.png")
        score = reward(media.from_pil([picture]), [prompt])
        assert score.valid.all(), score.reasons
        rows.append({"image": f"{number}.png", "prompt": prompt, "score": score.value.item()})
    vision = {"img_size": sizes.image, "patch_size": sizes.patch, "embed_dim": sizes.vision_width}
    vision |= {"depth": sizes.vision_layers, "num_heads": sizes.vision_width // 64}
    case = {"rows": rows, "vision": None if sizes == FULL else vision, "text_width": sizes.text_width}
    (folder / "case.json").write_text(json.dumps(case, indent=1))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_case(sys.argv[1], FULL if "--full" in sys.argv else None)
