"""Scores of the published hpsv2 package, and of trl's aesthetic scorer, against those in a folder; needs no diffalign.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.36.2 pillow
    ENV/bin/pip install --no-deps torchvision==0.28.0 hpsv2==1.2.0 trl==0.23.1 clint args ftfy regex wcwidth
    python -m tests.parity.clip_family_case FOLDER BPE
    ENV/bin/python tests/parity/clip_family.py FOLDER BPE

prints one JSON line a package; with --seconds, how long hpsv2's loop takes. What is done to them, here and in memory:

- hpsv2's wheel lacks CLIP's merges, which BPE gives; it imports turtle, a drawing toy that needs a screen, and uses
  nothing of it; its architecture ViT-H-14 gets the sizes of the folder, and the weights of LAION that it would
  download first, only to replace them, are left out;
- trl's scorer is loaded from its own file alone; it takes the folder's CLIP for openai/clip-vit-large-patch14;
- torchvision's missing schemas are declared where its wheel lies beside a torch without CUDA.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from beside import mend_torchvision


def largest(found, expected):
    """Difference relative to the spread of the expected scores."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    return {"largest_difference": float((found - expected).abs().max()), "spread": float(expected.std())}


def hpsv2_package(folder, bpe, case):
    """The module with `score`, of the folder's sizes."""
    sys.modules["turtle"] = types.ModuleType("turtle")
    sys.modules["turtle"].forward = None
    os.environ["HPS_ROOT"] = str(folder)
    package = Path(importlib.util.find_spec("hpsv2").origin).parent
    merges = str(package / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz")
    opened = gzip.open
    gzip.open = lambda path, *a, **k: opened(bpe if str(path) == merges else path, *a, **k)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    factory._MODEL_CONFIGS["ViT-H-14"] = {
        "embed_dim": case["embed_dim"],
        "vision_cfg": case["vision"],
        "text_cfg": case["text"],
    }
    factory.get_pretrained_cfg = lambda *_: {"mean": None, "std": None}
    factory.download_pretrained = lambda *_, **__: str(folder / "HPS_v2.1_compressed.pt")
    return img_score


def hps(folder, bpe, case):
    """hpsv2.score of every image and prompt."""
    img_score, checkpoint = hpsv2_package(folder, bpe, case), str(folder / "HPS_v2.1_compressed.pt")
    files = [str(folder / f"{number}.png") for number in range(len(case["hps"]))]
    scores = [img_score.score(files, prompt, cp=checkpoint) for prompt in case["prompts"]]
    rows = [list(map(float, row)) for row in zip(*scores, strict=True)]
    return {"peer": f"hpsv2 {importlib.metadata.version('hpsv2')}"} | largest(rows, case["hps"])


def hps_seconds(folder, bpe, case):
    """Seconds of hpsv2.score, called for each image with its prompt, after one call to warm up."""
    img_score, checkpoint = hpsv2_package(folder, bpe, case), str(folder / "HPS_v2.1_compressed.pt")
    rows = [(str(folder / f"{number}.png"), prompt) for number, prompt in enumerate(case["prompts"])]
    img_score.score(*rows[0], cp=checkpoint)
    start = time.perf_counter()
    scores = [float(img_score.score(*row, cp=checkpoint)[0]) for row in rows]
    return {"seconds": time.perf_counter() - start} | largest(scores, case["hps"])


def aesthetic(folder, case):
    """trl's AestheticScorer of the square images."""
    import transformers
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    place = Path(importlib.util.find_spec("trl").origin).parent / "models" / "auxiliary_modules.py"
    spec = importlib.util.spec_from_file_location("trl_auxiliary", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CLIPModel = types.SimpleNamespace(
        from_pretrained=lambda _: transformers.CLIPModel.from_pretrained(folder / "clip")
    )
    module.hf_hub_download = lambda folder, name: str(Path(folder, name))
    scorer = module.AestheticScorer(dtype=torch.float32, model_id=str(folder), model_filename="head.pth")
    files = [folder / f"square-{number}.png" for number in range(len(case["aesthetic"]))]
    with torch.no_grad():
        found = scorer(torch.stack([to_tensor(Image.open(file)) for file in files]))
    return {"peer": f"trl {importlib.metadata.version('trl')}"} | largest(found, case["aesthetic"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    folder = Path(sys.argv[1])
    case = json.loads((folder / "case.json").read_text())
    mend_torchvision()
    if "--seconds" in sys.argv:
        print(json.dumps(hps_seconds(folder, sys.argv[2], case)))
        sys.exit()
    print(json.dumps(aesthetic(folder, case)))
    print(json.dumps(hps(folder, sys.argv[2], case)))
