"""Random checkpoints in the published layouts of HPSv2 and of LAION's aesthetic head, and scores to compare.

    python -m tests.parity.clip_family_case FOLDER BPE [--head FILE]

BPE is `bpe_simple_vocab_16e6.txt.gz`, CLIP's merges as open_clip carries them; FILE is a published head for embeddings
of 768 numbers in the place of a random one. Writes into FOLDER a CLIP with CLIP's own vocabulary, head.pth,
HPS_v2.1_compressed.pt, images, and case.json with our scores.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffalign import media
from diffalign._compat import ensure_torchvision
from diffalign.rewards.aesthetic import AestheticReward
from diffalign.rewards.hps import HPSReward
from diffalign.rewards.weights import read_weights

PROMPTS = [
    "a red circle",
    "A photo of an astronaut riding a horse, 4k!",
    "",
    "café ∆ it's 3 o'clock",
    "very " * 100 + "long",  # past the 77 tokens
]
SHAPES = [(224, 224), (97, 333), (303, 200), (512, 387), (61, 40)]
VISION = {"image_size": 224, "layers": 2, "width": 128, "head_width": 64, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def tokenizer(bpe):
    """CLIP's, from the file of its merges: bytes, bytes at the end of a word, merges, two marks."""
    from transformers import CLIPTokenizer

    with gzip.open(bpe, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves, others follow
    letters = [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def write_clip(folder, bpe):
    """A random CLIP with embeddings of 768 numbers, as transformers saves it; activations are of all sizes."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    marks = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    vision = {"image_size": 224, "patch_size": 32, "hidden_size": 128, "intermediate_size": 512}
    config = CLIPConfig(
        text_config=text | marks | {"num_attention_heads": 2, "hidden_act": "gelu"},
        vision_config=vision | {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"},
        projection_dim=768,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(folder)
    tokenizer(bpe).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return model


def head():
    """A random head of embeddings of 768 numbers in the published layout."""
    random = torch.Generator().manual_seed(1)
    sizes = {"layers.0": (1024, 768), "layers.2": (128, 1024), "layers.4": (64, 128), "layers.6": (16, 64)}
    sizes["layers.7"] = (1, 16)
    weights = {f"{k}.weight": torch.randn(size, generator=random) / size[1] ** 0.5 for k, size in sizes.items()}
    return weights | {f"{k}.bias": torch.randn(size[0], generator=random) for k, size in sizes.items()}


def picture(shape, seed):
    """A smooth ground with hard edges on it."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape)
    ground = np.stack([np.sin(6 * random.random() * rows + 6 * random.random() * columns) for _ in range(3)], -1)
    disc = (rows - 0.4) ** 2 + (columns - 0.3) ** 2 < 0.04
    pixels = np.where(disc[..., None], random.integers(0, 256, 3), 127 + 120 * ground)
    return Image.fromarray(pixels.astype(np.uint8))


def write(folder, bpe, published=None):
    """Writes the case and returns what case.json holds."""
    ensure_torchvision()
    from diffalign.zoo.open_clip_export import state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = write_clip(folder / "clip", bpe)
    torch.save({"state_dict": state_dict(model)}, folder / "HPS_v2.1_compressed.pt")
    torch.save(read_weights(Path(published)) if published else head(), folder / "head.pth")
    hps = HPSReward(folder / "HPS_v2.1_compressed.pt", folder / "clip")
    aesthetic = AestheticReward(folder / "clip", folder / "head.pth")
    case = {"hps": [], "aesthetic": [], "prompts": PROMPTS, "vision": VISION, "text": TEXT, "embed_dim": 768}
    for number, shape in enumerate(SHAPES):
        image = picture(shape, number)
        image.save(folder / f"{number}.png")
        images = media.from_pil([image] * len(PROMPTS))
        case["hps"].append(hps(images, PROMPTS).value.tolist())
        # Its published preprocessings differ (LAION's is CLIP's, trl's is bilinear): the network is compared where
        # nothing is left to resize.
        square = media.from_pil(picture((224, 224), number + 10))
        media.save_png(square[0], folder / f"square-{number}.png")
        case["aesthetic"].append(float(aesthetic(square, [""]).value))
    (folder / "case.json").write_text(json.dumps(case))
    return case


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], sys.argv[4] if "--head" in sys.argv else None)
