"""Images of the over-optimisation benchmark: many samples of few prompts, in part files, resumable.

    python tests/benchmarks/over_optimisation_images.py [--out runs/over_optimisation] [--prompts 12] [--samples 1016]

Image (prompt, sample) has the noise of that address, so parts may come in any order and number.
"""

import argparse
import os
import time
from pathlib import Path

from diffalign._compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from diffalign.noise import normal  # noqa: E402
from diffalign.registry import data_root  # noqa: E402
from diffalign.zoo.evaluate import read_prompts  # noqa: E402

STEPS, GUIDANCE = 6, 1.0
"""Cheap, and wrong more often than the card's 20 steps at guidance 3: there is more to gain, and more to get wrong."""
TRAIN_PROMPTS, TRAIN_SAMPLES = 64, 8
"""Of the pairs that the small heads learn from: prompts of the train split, never those that are judged."""
BATCH = 64
PROMPTS, REFERENCES = 12, 16
SAMPLES = REFERENCES + 1000
"""Of each prompt that is judged: 16 that references are made of, and those that the best is chosen from."""


def prompts(split, count):
    return read_prompts(data_root() / "prompts" / f"shapes-{split}.jsonl", count)


def plan(split, captions, samples):
    """(file name, rows) of each part; a row is (prompt index, sample index), samples in the outer loop."""
    rows = [(p, s) for s in range(samples) for p in range(len(captions))]
    return [(f"{split}-{i // BATCH:04d}.safetensors", rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


@torch.no_grad()
def draw(pipeline, split, captions, rows):
    """8-bit images (B, 3, 64, 64)."""
    latents = normal((4, 16, 16), seed=0, purpose=f"over-optimisation {split}", rows=rows)
    chosen = [captions[p] for p, _ in rows]
    images = pipeline(
        chosen, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt"
    ).images
    return (images * 255).round().byte()


def draw_all(out, split, captions, samples):
    out.mkdir(parents=True, exist_ok=True)
    left = [(name, rows) for name, rows in plan(split, captions, samples) if not (out / name).exists()]
    if not left:
        return
    pipeline = DiffusionPipeline.from_pretrained(data_root() / "zoo" / "shapes-sd")
    pipeline.set_progress_bar_config(disable=True)
    clock = time.monotonic()
    for done, (name, rows) in enumerate(left, 1):
        images = draw(pipeline, split, captions, rows)
        save_file({"images": images, "rows": torch.tensor(rows)}, out / f"{name}.new")
        os.replace(out / f"{name}.new", out / name)
        rate = done * BATCH / (time.monotonic() - clock)
        print(f"{split}: part {done} of {len(left)}, {rate:.2f} images/s", flush=True)


def arguments(description):
    """Of this program, and of the one that looks at its images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/over_optimisation"))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    return parser.parse_args()


def main():
    args = arguments(__doc__)
    draw_all(args.out / "images", "train", prompts("train", TRAIN_PROMPTS), TRAIN_SAMPLES)
    draw_all(args.out / "images", "validation", prompts("validation", args.prompts), args.samples)


if __name__ == "__main__":
    main()
