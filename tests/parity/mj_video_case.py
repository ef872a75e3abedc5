"""A random checkpoint in the published layout of MJ-VIDEO, for `mj_video.py` to compare scores on.

    python -m tests.parity.mj_video_case FOLDER

writes the checkpoint, base/ with weights of its own, frames, texts with their tokens, and case.json with our scores.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffalign import media
from diffalign.rewards.mj_video import MJVideoReward
from diffalign.rewards.mj_video.head import ASPECTS
from diffalign.rewards.mj_video.tokenizer import read_tokenizer
from diffalign.rewards.weights import within
from tests.rewards.pictures import larger_pictures
from tests.rewards.tiny_internvl import WORDS, save_mj_video

PROMPTS = ["a red circle", "Two blue squares, {zzz}", "", "red circles, " * 40]
CLIPS = {"a": (11, 60, 90), "b": (33, 240, 320), "c": (3, 56, 56), "d": (8, 333, 200)}


def texts():
    """Random strings of what the pieces are made of, of spaces and of other letters."""
    draw = random.Random(0)
    parts = [word.replace("▁", " ") for word in WORDS] + [
        " ",
        "\n",
        "a",
        "ss",
        "é",
        "国",
        "<image>",
        "[blank]",
        "<box>",
    ]
    return ["".join(draw.choices(parts, k=draw.randrange(1, 30))) for _ in range(300)]


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_mj_video(folder)
    save_file(
        within(load_file(folder / "model.safetensors"), "model."),
        folder / "base" / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer, drawn = read_tokenizer(str(folder / "base"), None), texts()
    case = {"texts": drawn, "tokens": [tokenizer.encode(text).ids for text in drawn], "clips": {}}
    reward = MJVideoReward(folder / "model.safetensors", folder / "base")
    for seed, ((name, shape), prompt) in enumerate(zip(CLIPS.items(), PROMPTS, strict=True)):
        frames = media.from_pil(list(larger_pictures(*shape, seed=seed)))
        np.save(folder / f"{name}.npy", media.to_uint8(frames).permute(0, 2, 3, 1).numpy())
        with torch.no_grad():
            parts = reward(frames[None], [prompt]).parts
        scores = [parts[f"mj-video-{part}"].item() for part in (*ASPECTS, "overall")]
        case["clips"][name] = {"prompt": prompt, "scores": scores}
    (folder / "case.json").write_text(json.dumps(case))


if __name__ == "__main__":
    main()
