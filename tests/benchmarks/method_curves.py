"""B²-DiffuRL and PRDP beside DDPO: the curves of three tries to see what their papers say of them.

    python -m tests.benchmarks.methods --only ddpo b2_diffurl prdp b2_diffurl_long  # the first try, three seeds
    python -m tests.benchmarks.method_curves --only ddpo b2_diffurl prdp            # two more, of one seed each
    python -m tests.benchmarks.method_curves --plot runs/curves/method-curves.png

The first are the runs of the benchmark. The second has three times its learning rate, for what is to be stable at large
steps; the third has many prompts with three samples each, which say less of one another, for what is to gain over many
prompts. A run that is there is not run again, and a killed one goes on. Curves are of the reward of each training
step's samples, mean of the last three steps. The table is of 64 validation prompts, two images each, before and after.
"""

import argparse
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from diffalign.engine.run import train
from diffalign.engine.tracking import read_metrics
from tests.benchmarks.methods import recipe_of

NAMES = {
    "ddpo": "DDPO",
    "b2_diffurl": "B²-DiffuRL",
    "prdp": "PRDP",
    "b2_diffurl_long": "B²-DiffuRL, as many evaluations as DDPO",
}
SEEDS = (0, 1, 2)
TRIES = {"rate": ("learning_rate=3e-3",), "prompts": ("num_prompts_per_step=64", "group_size=3")}
TITLES = {"benchmark": "As in the benchmark, three seeds", "rate": "Rate of 3e-3", "prompts": "64 prompts, 3 samples"}
VALIDATED = ("evaluation.num_validation_prompts=64", "evaluation.num_images_per_prompt=2")
SMOOTHED = 3


def run(name: str, about: str, out: Path) -> None:
    """Train a method in one of the two own tries, unless it is there."""
    folder = out / f"{name}.{about}"
    if not (folder / "lora").exists():
        train(recipe_of(name, 0, folder, *TRIES[about], *VALIDATED))


def curve(folder: Path) -> np.ndarray:
    """(3, N): scored samples and evaluations so far, and the smoothed reward, at each training step."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "nfe" in row]
    spent = [list(accumulate(row[key] for row in rows)) for key in ("reward_calls", "nfe")]
    rewards = np.array([row["reward"] for row in rows])
    window = [rewards[max(0, i - SMOOTHED + 1) : i + 1].mean() for i in range(len(rewards))]
    return np.array([*spent, window])


def folders(name: str, about: str, methods: Path, out: Path) -> list[Path]:
    """Where the runs of a try are, those that are there."""
    found = [methods / f"{name}.{seed}" for seed in SEEDS] if about == "benchmark" else [out / f"{name}.{about}"]
    return [folder for folder in found if (folder / "lora").exists()]


def plot(methods: Path, out: Path, path: Path) -> None:
    """A column for each try: the reward against scored samples, and against evaluations of the denoiser."""
    figure, axes = plt.subplots(2, len(TITLES), figsize=(11, 6), sharey="col", layout="constrained")
    for column, (about, title) in enumerate(TITLES.items()):
        for line, (name, label) in enumerate(NAMES.items()):
            found = [curve(folder) for folder in folders(name, about, methods, out)]
            if not found:
                continue
            samples, evaluations, reward = np.mean(found, axis=0)
            for axis, x in zip(axes[:, column], (samples, evaluations), strict=True):
                axis.plot(x, reward, color=f"C{line}", label=label)
        axes[0, column].set(title=title, xlabel="scored samples")
        axes[1, column].set(xlabel="evaluations of the denoiser")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("reward of the samples")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=len(NAMES))
    figure.savefig(path, dpi=100)


def table(out: Path) -> None:
    """Print what the validation prompts say before and after the two own tries."""
    columns = {"validation/shapes-clip": "reward", "heldout/shapes-oracle": "oracle", "diversity": "diversity"}
    print(f"| try | method | {' | '.join(columns.values())} | evaluations |\n|---|---|{'---|' * 4}")
    for about in TRIES:
        for name, label in NAMES.items():
            for folder in folders(name, about, out, out):
                rows = read_metrics(folder / "metrics.jsonl")
                first, last = rows[0], [row for row in rows if "diversity" in row][-1]
                told = [f"{first[key]:.4f} to {last[key]:.4f}" for key in columns]
                spent = sum(row.get("nfe", 0) for row in rows)
                print(f"| {TITLES[about]} | {label} | {' | '.join(told)} | {spent:,} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--methods", type=Path, default=Path("runs/methods"), help="where the benchmark's runs are")
    parser.add_argument("--only", nargs="*", choices=["ddpo", "b2_diffurl", "prdp"], default=[], help="run these")
    parser.add_argument("--tries", nargs="+", choices=list(TRIES), default=list(TRIES))
    parser.add_argument("--plot", type=Path, help="write the picture of what is there")
    args = parser.parse_args()
    for about in args.tries:
        for name in args.only:
            run(name, about, args.out)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(args.methods, args.out, args.plot)
        table(args.out)


if __name__ == "__main__":
    main()
