"""Random checkpoints in the published layouts of HPSv3 and VideoReward, for `qwen_rewards.py` to compare scores on.

    python -m tests.parity.qwen_rewards_case FOLDER

writes hpsv3/, video/, images, frames, and case.json with our scores.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from diffalign import media
from diffalign.rewards.qwen_rewards import HPSv3Reward, VideoReward
from tests.rewards.test_vlm_local import pictures
from tests.rewards.tiny_qwen import save_hpsv3, save_video_reward

PROMPTS = ["a red circle", "Two blue squares, {zzz}", "", "red circles, " * 60]
SHAPES = [(448, 448), (97, 333), (1024, 768), (61, 40)]
CLIPS = {"a": (9, 60, 90, 3.0), "b": (33, 480, 640, 16.0), "c": (5, 333, 200, 24.0)}


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    places = folder / "hpsv3", folder / "video"
    for place in places:
        place.mkdir()
    save_hpsv3(places[0])
    save_video_reward(places[1])
    case = {"prompts": PROMPTS, "images": [], "video_prompts": PROMPTS[:3], "fps": {}, "hpsv3": [], "video_reward": []}
    image_reward = HPSv3Reward(places[0] / "HPSv3.safetensors", places[0] / "base")
    for seed, (shape, prompt) in enumerate(zip(SHAPES, PROMPTS, strict=True)):
        image = next(pictures(1, *shape, seed=seed))
        image.save(folder / f"{seed}.png")
        case["images"].append(f"{seed}.png")
        score = image_reward(media.from_pil([image]), [prompt])
        case["hpsv3"].append([score.value.item(), score.sigma.log().item()])
    clip_reward = VideoReward(places[1] / "checkpoint-7" / "model.pth", places[1] / "base")
    for seed, (name, prompt) in enumerate(zip(CLIPS, PROMPTS, strict=False)):
        count, height, width, case["fps"][name] = CLIPS[name]
        frames = media.from_pil(list(pictures(count, height, width, seed=seed)))
        np.save(folder / f"{name}.npy", media.to_uint8(frames).permute(0, 2, 3, 1).numpy())
        with torch.no_grad():
            score = clip_reward(frames[None], [prompt], [{"fps": case["fps"][name]}])
        parts = [score.parts[f"video-reward-{aspect}"].item() for aspect in ("VQ", "MQ", "TA")]
        case["video_reward"].append([*parts, score.value.item()])
    (folder / "case.json").write_text(json.dumps(case))


if __name__ == "__main__":
    main()
