"""DRAGON on the zoo: four set rewards, each raised by its own recipe, and the win rate against the untrained model.

    python tests/benchmarks/dragon.py [--rewards frechet kid vendi captions] [--images 512] [--set 64] [--seeds 0]
    [--out runs/dragon] [key=value ...]

Each recipe `shapes-sd3-dragon-REWARD` is trained as `diffalign train` does it; runs that are finished are not run
again, one that was stopped is resumed. Then the test prompts, which no training has seen, are drawn with the adapter
and without it from the same noise, and scored:

- each of the four rewards of all images, and its win rate: the share of 1,000 random sets of `--set` prompts whose
  value is above that of the untrained model's images of the same prompts and noise;
- of the rewards with exemplars the share of single images that come nearer to them (`ExemplarReward`);
- the share of the picture that is painted, which grows where shapes do, as in the exemplars;
- the oracle, which no reward knows, with a paired 95 % interval over prompts.

Writes results.json and results.md into `--out`, and pictures.png: the first test prompts without and with each adapter.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import diffalign as da
from diffalign import media, rewards
from diffalign.config import load_recipe
from diffalign.data import read_prompts
from diffalign.engine.evaluate import sample_images, score_images
from diffalign.engine.load import load_policy
from diffalign.report import compare
from diffalign.rewards.sets import ExemplarReward
from diffalign.zoo.render import BACKGROUND

REWARDS = ("frechet", "kid", "vendi", "captions")
PIPELINE, ORACLE = "shapes-sd3-dragon", "shapes-oracle"
DRAWS, SHOWN = 1000, 12


def train(name, seed, out, overrides):
    """The folder of a finished run; SystemExit for one that was made with other settings."""
    folder = out / f"{name}-{seed}"
    settings = [f"seed={seed}", f"output_dir={folder}", "evaluation.num_test_prompts=64", *overrides]
    if (folder / "config.yaml").exists():
        asked, made = load_recipe(f"{PIPELINE}-{name}", settings), load_recipe(folder / "config.yaml")
        if asked.model_dump(exclude={"resume_from_checkpoint"}) != made.model_dump(exclude={"resume_from_checkpoint"}):
            raise SystemExit(f"{folder} was made with other settings: give another --out")
    if not (folder / "report.html").exists():
        resume = ["resume_from_checkpoint=latest"] if (folder / "metrics.jsonl").exists() else []
        command = [sys.executable, "-m", "diffalign", "train", f"{PIPELINE}-{name}"]
        subprocess.run([*command, *settings, *resume], check=True)
    return folder


def drawn(policy, recipe, prompts, seed):
    """Images of the test prompts, scored by the oracle, on noise that neither training nor validation has seen."""
    images = sample_images(policy, prompts, seed=seed + 1000, **recipe.evaluation.sampling())
    return score_images(images, {ORACLE: rewards.load(ORACLE)})


def features_of(credit, images):
    """What a set reward sees of 8-bit images, (N, D) float64."""
    return torch.cat([credit.of_set.encoder(media.from_uint8(part)) for part in images.split(64)]).double()


def win_rate(reward, base, tuned, size):
    """Share of random sets, of the same rows of both, whose value is above that of the base."""
    rng = np.random.default_rng(0)
    wins = 0.0
    for _ in range(DRAWS):
        rows = torch.from_numpy(rng.choice(len(base), size, replace=False))
        before, after = reward.value(base[rows]), reward.value(tuned[rows])
        wins += float(after > before) + 0.5 * float(after == before)
    return wins / DRAWS


def nearer(credit, base, tuned):
    """Share of images that are nearer to the exemplars than the base's image; None without exemplars."""
    reference = getattr(credit.of_set, "reference", None)
    if reference is None:
        return None
    alone = ExemplarReward(reference, lambda features: features)
    before, after = (alone.values(side, [], []) for side in (base, tuned))
    return float((after > before).double().mean() + 0.5 * (after == before).double().mean())


def painted(images):
    """Share of pixels (mean over images) that are not background, of 8-bit images."""
    return float(((media.from_uint8(images) - BACKGROUND[:, None, None]).abs().amax(1) > 0.15).float().mean())


@torch.no_grad()
def measure(credits, base, tuned, size):
    """Figures of one adapter by every reward, and by the oracle."""
    found = {}
    for name, credit in credits.items():
        before, after = (features_of(credit, side.images) for side in (base, tuned))
        found[name] = {
            "base": float(credit.of_set.value(before)),
            "tuned": float(credit.of_set.value(after)),
            "win_rate": win_rate(credit.of_set, before, after, size),
            "nearer": nearer(credit, before, after),
        }
    ids = [prompt.id for prompt in base.prompts]
    figure = compare(ORACLE, "oracle", base.scores[ORACLE], tuned.scores[ORACLE], ids)
    kept = ("base", "tuned", "difference", "low", "high")
    found["painted"] = [painted(side.images) for side in (base, tuned)]
    return found | {"oracle": {key: getattr(figure, key) for key in kept}}


def table(results, size):
    """Markdown: a row for each run."""
    of_sets = f"win rate, sets of {size}"
    heads = ("trained on", "its value", of_sets, "images nearer", "painted, %", "oracle, %", "other win rates")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run, found in results.items():
        name = run.rsplit("-", 1)[0]
        own, oracle = found[name], found["oracle"]
        others = ", ".join(f"{other} {found[other]['win_rate']:.2f}" for other in REWARDS if other != name)
        single = "" if own["nearer"] is None else f"{own['nearer']:.3f}"
        truth = (
            f"{100 * oracle['base']:.1f} to {100 * oracle['tuned']:.1f}: {100 * oracle['difference']:+.1f} "
            f"({100 * oracle['low']:+.1f} to {100 * oracle['high']:+.1f})"
        )
        value = f"{own['base']:.4f} to {own['tuned']:.4f}"
        ink = " to ".join(f"{100 * share:.1f}" for share in found["painted"])
        lines.append(f"| {run} | {value} | {own['win_rate']:.3f} | {single} | {ink} | {truth} | {others} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS)
    parser.add_argument("--images", type=int, default=512, help="test prompts, one image each")
    parser.add_argument("--set", type=int, default=64, help="images in a set of the win rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/dragon"))
    arguments, overrides = parser.parse_known_args()
    credits = {name: rewards.load(f"shapes-{name}") for name in REWARDS}
    results, pictures = {}, []
    for seed in arguments.seeds:
        folders = {name: train(name, seed, arguments.out, overrides) for name in arguments.rewards}
        recipe = load_recipe(folders[arguments.rewards[0]] / "config.yaml")
        prompts = read_prompts(recipe.prompts.test)[: arguments.images]
        base = drawn(load_policy(recipe.pipeline), recipe, prompts, seed)
        pictures.append(base.images[:SHOWN])
        for name, folder in folders.items():
            policy = load_policy(recipe.pipeline)
            policy.load_lora(folder / "lora")
            tuned = drawn(policy, recipe, prompts, seed)
            pictures.append(tuned.images[:SHOWN])
            results[f"{name}-{seed}"] = measure(credits, base, tuned, arguments.set)
            print(table({f"{name}-{seed}": results[f"{name}-{seed}"]}, arguments.set), flush=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    (arguments.out / "results.md").write_text(table(results, arguments.set))
    grid = media.grid(media.from_uint8(torch.cat(pictures)), columns=SHOWN)
    media.save_png(grid, arguments.out / "pictures.png")
    print(table(results, arguments.set))


if __name__ == "__main__":
    assert da  # before transformers and diffusers
    main()
