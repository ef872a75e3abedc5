"""ReNO on the one-step generator of the zoo: the oracle's verdict before and after, and best-of-n in its time.

    python -m tests.benchmarks.reno_oracle --split test --prompts 128 --out runs/reno-oracle

The noise is optimised for shapes-clip by 50 iterations at the defaults; the oracle and shapes-preference only
judge. Best-of-n gets the seconds that the optimisation took. Writes the figures and a sheet: plain, best-of-n, ReNO.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from diffalign import media, rewards
from diffalign.data import read_prompts
from diffalign.policies import Policy
from diffalign.search import BestOfN, ReNO

CHAIN = {"num_inference_steps": 1, "guidance_scale": 1.0, "eta": 0.0}
BATCH = 16


def judged(images, prompts, judges):
    """Scores (N,) of 8-bit images by each judge."""
    pixels = media.from_uint8(torch.stack(images))
    told = [p.text for p in prompts], [p.metadata for p in prompts]
    return {name: judge(pixels, *told).value.double().numpy() for name, judge in judges.items()}


def paired(after, before):
    """Mean difference and 1.96 standard errors over prompts."""
    difference = after - before
    return f"{difference.mean():+.4f} +- {1.96 * difference.std(ddof=1) / len(difference) ** 0.5:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/reno-oracle"))
    args = parser.parse_args()
    prompts = read_prompts(f"prompts:shapes-{args.split}")[: args.prompts]
    policy, reward = Policy.from_pretrained("zoo:shapes-turbo"), rewards.load("shapes-clip")
    policy.set_max_sequence_length(16)
    judges = {name: rewards.load(name) for name in ("shapes-clip", "shapes-preference", "shapes-oracle")}
    images = {"one step": [], "best-of-n": [], "ReNO": []}
    seconds, samples = 0.0, 0
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        plain = BestOfN(policy, reward, **CHAIN).search(batch, reward_calls=1)
        began = time.perf_counter()
        found = ReNO(policy, reward, **CHAIN).search(batch, nfe=args.iterations)
        spent = time.perf_counter() - began
        many = BestOfN(policy, reward, wave=4, **CHAIN).search(batch, seconds=spent / len(batch))
        for name, results in zip(images, (plain, many, found), strict=True):
            images[name] += [each.best_image for each in results]
        seconds, samples = seconds + spent, samples + sum(map(len, many))
        print(f"{start + len(batch)} of {len(prompts)} prompts, {seconds:.0f} s of ReNO", flush=True)
    scores = {name: judged(each, prompts, judges) for name, each in images.items()}
    for name, each in scores.items():
        means = ", ".join(f"{judge} {values.mean():.4f}" for judge, values in each.items())
        gain = paired(each["shapes-oracle"], scores["one step"]["shapes-oracle"])
        print(f"{name}: {means}; oracle over one step {gain}")
    print(
        f"ReNO over best-of-n, oracle: {paired(scores['ReNO']['shapes-oracle'], scores['best-of-n']['shapes-oracle'])}"
    )
    print(f"{seconds / len(prompts):.2f} s for a prompt, in which best-of-n draws {samples / len(prompts):.0f}")
    args.out.mkdir(parents=True, exist_ok=True)
    told = {name: {judge: values.tolist() for judge, values in each.items()} for name, each in scores.items()}
    (args.out / "results.json").write_text(json.dumps(told | {"samples": samples, "seconds": seconds}))
    few = np.linspace(0, len(prompts) - 1, 12).astype(int)
    media.grid(torch.stack([images[name][i] for name in images for i in few]), columns=len(few)).save(
        args.out / "sheet.png"
    )


if __name__ == "__main__":
    main()
