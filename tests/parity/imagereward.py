"""Scores of the published ImageReward package against those in a folder, in an environment of its own, no diffalign.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.36.2 pillow
    ENV/bin/pip install --no-deps torchvision==0.28.0 timm==0.6.13 fairscale==0.4.13 image-reward==1.5
    python -m tests.parity.imagereward_case FOLDER
    ENV/bin/python tests/parity/imagereward.py FOLDER

prints one JSON line. What is done to the package, all of it here and in memory:

- transformers is of 2023: later ones have moved what the package imports;
- the package's `__init__` files are passed over: for training and for other scorers they import clip, accelerate,
  datasets and diffusers;
- torchvision's missing schemas are declared where its wheel lies beside a torch without CUDA;
- bert-base-uncased is the folder of that name in FOLDER, which is the working directory;
- where the checkpoint is not of the published sizes, the ViT, the head's input and the crop have those of case.json.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import types
import warnings
from pathlib import Path

from beside import mend_torchvision


def import_package():
    """The module with the class ImageReward, and the one that builds its BLIP."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    warnings.simplefilter("ignore")
    mend_torchvision()
    folder = Path(importlib.util.find_spec("ImageReward").origin).parent
    for name, path in (("ImageReward", folder), ("ImageReward.models", folder / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    return (importlib.import_module(f"ImageReward.{name}") for name in ("ImageReward", "models.BLIP.blip_pretrain"))


def build(case):
    """The package's model with the folder's weights."""
    import torch

    scorer, pretrain = import_package()
    if case["vision"]:
        vit = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
        head = scorer.MLP
        pretrain.create_vit = lambda *_: (vit(**case["vision"]), case["vision"]["embed_dim"])
        scorer.MLP = lambda _: head(case["text_width"])
    model = scorer.ImageReward(med_config="med_config.json", device="cpu")
    if case["vision"]:
        model.preprocess = scorer._transform(case["vision"]["img_size"])
    told = model.load_state_dict(torch.load("ImageReward.pt", weights_only=True), strict=False)
    strange = {*told.missing_keys, *told.unexpected_keys} - {"blip.text_encoder.embeddings.position_ids"}
    if strange:
        raise SystemExit(f"the checkpoint is not of the published layout: {sorted(strange)[:5]}")
    return model.eval()


def main(folder):
    """Scores every row of case.json and prints the largest difference."""
    os.chdir(folder)
    case = json.loads(Path("case.json").read_text())
    model = build(case)
    import torch

    with torch.no_grad():
        theirs = [model.score(row["prompt"], row["image"]) for row in case["rows"]]
    ours = [row["score"] for row in case["rows"]]
    names = ("image-reward", "transformers", "timm", "torch", "torchvision", "pillow")
    print(
        json.dumps(
            {
                "versions": {name: importlib.metadata.version(name) for name in names},
                "published_sizes": case["vision"] is None,
                "images": len(ours),
                "range": [min(theirs), max(theirs)],
                "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
