"""What holds a policy: one run of reward backpropagation without a target, held in three ways or not at all.

    python -m tests.benchmarks.regularisers --out runs/regularisers [--only none sft] [--seed 0]

Everything else is as in `tests.benchmarks.methods`: 4,080 samples on `shapes-sd`, six steps with noise, no guidance,
the test prompts read at the end. The supervised images are the untrained pipeline's, one for each of 512 training
prompts, in 20 steps without noise. A finished run is not run again, a killed one goes on. Nine minutes a run on one
core.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from diffalign.cli.sample import write
from diffalign.data import read_prompts
from diffalign.engine.evaluate import sample_images
from diffalign.engine.load import load_policy
from diffalign.engine.run import train
from tests.benchmarks.methods import chain_kl, measured, recipe_of, run_search
from tests.benchmarks.methods_tables import JUDGES, of_prompts, paired

PIPELINE, IMAGES = "shapes-sd", 512
LINEAR = ("method.loss=linear", "method.target=null", "method.kl_weight=0")
WAYS = {
    "none": (),
    "kl_weight": ("method.kl_weight=0.1",),
    "weight_l2": ("weight_l2=1e-3",),
    "sft": ("sft.weight=0.1", "sft.batch_size=24"),
}


def draw_images(policy, folder: Path) -> Path:
    """The list of the supervised images, drawn unless they are there."""
    if not (folder / "grid.png").exists():  # which is written last
        prompts = read_prompts("prompts:shapes-train")[:IMAGES]
        write(sample_images(policy, prompts, seed=0, num_inference_steps=20, guidance_scale=1.0), folder, 1, seed=0)
    return (folder / "samples.jsonl").absolute()


def run(way: str, seed: int, out: Path) -> dict:
    """Train, and measure on the test prompts."""
    folder = out / f"{way}.{seed}"
    own = [*LINEAR, *WAYS[way]]
    if way == "sft":
        policy = load_policy(recipe_of("reward_backprop", seed, folder, *LINEAR).pipeline)
        own.append(f"sft.images={draw_images(policy, out / 'images')}")
    recipe = recipe_of("reward_backprop", seed, folder, *own)
    if not (folder / "lora").exists():
        train(recipe)
    policy = load_policy(recipe.pipeline)
    policy.load_lora(str(folder / "lora"))
    distance = float(policy.squared_update())
    return measured(policy, PIPELINE, seed) | {"kl": chain_kl(policy, PIPELINE, seed), "weight_l2": distance}


def table(found: dict[str, dict]) -> None:
    """Print scores over the base, paired over prompts, and how far each went."""
    heads = [*(head for head, *_ in JUDGES.values()), "diversity", "KL, nats", "distance of the weights"]
    print(f"| held by | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
    for way, one in found.items():
        base = [found["base"]]
        gains = [paired(of_prompts([one], j), of_prompts(base, j), s, d) for j, (_, s, d) in JUDGES.items()]
        spread = f"{np.mean(one['diversity']):.4f}"
        far = [f"{one['kl']:.0f}", f"{one['weight_l2']:.2f}"] if "kl" in one else ["", ""]
        if way == "base":
            gains = [f"{s * of_prompts(base, j).mean():.{d}f}" for j, (_, s, d) in JUDGES.items()]
        print(f"| {' | '.join([way, *gains, spread, *far])} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/regularisers"))
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for way in ["base", *args.only]:
        path = args.out / f"{way}.{args.seed}.json"
        if not path.exists():
            measures = run_search(PIPELINE, args.seed, 1.0, 1) if way == "base" else run(way, args.seed, args.out)
            path.write_text(json.dumps(measures))
            print(f"{way}: done", flush=True)
        found[way] = json.loads(path.read_text())
    table(found)


if __name__ == "__main__":
    main()
