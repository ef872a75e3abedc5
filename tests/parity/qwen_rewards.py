"""Scores of the authors' code of HPSv3 and VideoReward against those in a folder, in an environment without diffalign.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.45.2 'tokenizers<0.21' peft==0.13.2 'numpy<2.3' pillow requests
    ENV/bin/pip install --no-deps torchvision==0.28.0 hpsv3==1.0.0
    git clone https://github.com/KwaiVGI/VideoAlign FOLDER/VideoAlign
    python -m tests.parity.qwen_rewards_case FOLDER
    ENV/bin/python tests/parity/qwen_rewards.py FOLDER

prints one JSON line. What is done to their code, all of it here and in memory:

- what it imports for training and logging, and is not installed, is an empty module;
- torchvision's missing schemas are declared where its wheel lies beside a torch without CUDA;
- decord's reader gives the frames of the folder, for there is no video file;
- weights and activations are float32, so that rounding hides no difference; rotary frequencies are rounded to bfloat16,
  as by the cast of the whole model that they run under. `vision` says whether the angles of the image encoder are too.
"""

import importlib
import json
import sys
import types
import warnings
from pathlib import Path

from beside import EmptyFinder, mend_torchvision

EMPTY = ("trl", "datasets", "pandas", "matplotlib", "fire", "omegaconf", "decord", "tensorboard", "deepspeed")
EMPTY += ("torch.utils.tensorboard",)


def prepare(folder):
    """Makes their modules importable."""
    warnings.simplefilter("ignore")
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    mend_torchvision()
    sys.meta_path.insert(0, EmptyFinder(EMPTY))
    sys.path.insert(0, str(folder / "VideoAlign"))


def rounded(model, vision):
    """The model with the rotary frequencies of bfloat16."""
    import torch

    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            kept = buffer.data.bfloat16()
            module = model.get_submodule(name.rpartition(".")[0])
            module.inv_freq = kept if vision and "visual" in name else kept.float()
    return model.to(torch.float32) if not vision else model


def build(model_class, folder, marks, **how):
    """(their model with random weights, their processor)."""
    from transformers import AutoConfig, AutoProcessor

    base = folder / "base"
    processor = AutoProcessor.from_pretrained(base, padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": marks})
    ids = processor.tokenizer.convert_tokens_to_ids(marks)
    model = model_class(AutoConfig.from_pretrained(base), special_token_ids=ids, reward_token="special", **how)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def hpsv3_scores(folder, case, vision):
    """Two outputs for each image, from the package's own `prepare_batch` and forward pass."""
    import torch
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from PIL import Image
    from safetensors.torch import load_file
    from torch import nn

    class Linear(nn.Linear):
        def __init__(self, ins, outs, **how):
            ins, outs = {(32, 1024): (32, 20), (1024, 16): (20, 6), (16, 2): (6, 2)}.get((ins, outs), (ins, outs))
            super().__init__(ins, outs, **how)

    kept, nn.Linear = nn.Linear, Linear  # what their head has fixed, in small
    how = {"output_dim": 2, "rm_head_type": "ranknet"}
    model, processor = build(Qwen2VLRewardModelBT, folder / "hpsv3", ["<|Reward|>"], **how)
    nn.Linear = kept
    model.load_state_dict(load_file(folder / "hpsv3" / "HPSv3.safetensors"), strict=True)
    scorer = object.__new__(HPSv3RewardInferencer)
    scorer.model, scorer.processor = rounded(model, vision), processor
    scorer.device, scorer.use_special_tokens = "cpu", True
    images = [Image.open(folder / name) for name in case["images"]]
    with torch.no_grad():
        return scorer.reward(images, case["prompts"]).tolist()


def video_scores(folder, case, vision):
    """VQ, MQ, TA, Overall of each video, from the repository's own reading, resizing, forward pass and scaling."""
    import decord
    import numpy as np
    import torch
    from data import DataConfig
    from inference import VideoVLMRewardInference
    from peft import LoraConfig, get_peft_model
    from train_reward import find_target_linear_names
    from trainer import Qwen2VLRewardModelBT
    from utils import load_model_from_checkpoint

    config = json.loads((folder / "video" / "model_config.json").read_text())
    marks = [f"<|{aspect}_reward|>" for aspect in ("VQ", "MQ", "TA")]
    model, processor = build(Qwen2VLRewardModelBT, folder / "video", marks, output_dim=1)
    lora = config["peft_lora_config"]
    names = find_target_linear_names(model, -1, ["lm_head", "rm_head", "embed_tokens", "visual"])
    model = get_peft_model(model, LoraConfig(target_modules=names, r=lora["lora_r"], lora_alpha=lora["lora_alpha"]))
    model, _ = load_model_from_checkpoint(model, str(folder / "video"), -1)

    class Reader:
        def __init__(self, name):
            self.frames, self.fps = np.load(folder / f"{Path(name).name}.npy"), case["fps"][Path(name).name]

        def __len__(self):
            return len(self.frames)

        def get_avg_fps(self):
            return self.fps

        def get_batch(self, index):
            return types.SimpleNamespace(asnumpy=lambda: self.frames[index])

    decord.VideoReader = Reader
    vision_process = importlib.import_module("vision_process")
    vision_process.get_video_reader_backend = lambda: "decord"
    scorer = object.__new__(VideoVLMRewardInference)
    scorer.model, scorer.processor = rounded(model.eval(), vision), processor
    scorer.device, scorer.data_config = "cpu", DataConfig(**config["data_config"])
    scorer.inference_config = config["inference_config"]
    with torch.no_grad():
        told = scorer.reward(list(case["fps"]), case["video_prompts"])
    return [[row[key] for key in ("VQ", "MQ", "TA", "Overall")] for row in told]


def main():
    folder = Path(sys.argv[1])
    prepare(folder)

    case = json.loads((folder / "case.json").read_text())
    report = {}
    for name, score in (("hpsv3", hpsv3_scores), ("video_reward", video_scores)):
        for vision in (False, True):
            theirs = score(folder, case, vision)
            gaps = [
                abs(a - b) for mine, row in zip(case[name], theirs, strict=True) for a, b in zip(mine, row, strict=True)
            ]
            report[f"{name}, vision angles {'rounded' if vision else 'not rounded'}"] = max(gaps)
        report[f"{name}, theirs"] = theirs
    print(json.dumps(report))


if __name__ == "__main__":
    main()
