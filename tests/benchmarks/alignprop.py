"""The full run of reward backpropagation on the zoo: 512 test images, 3 seeds, and the curves of proxy against oracle.

    python tests/benchmarks/alignprop.py [--recipes shapes-sd-alignprop shapes-sd3-alignprop] [--seeds 0 1 2]
    [key=value ...]

Runs that are finished are not run again; one that was stopped is resumed. Writes results.json, results.md and
curves.png into `--out` (default runs/alignprop).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

PROXY, ORACLE = "shapes-clip", "shapes-oracle"


def run(recipe, seed, out, overrides):
    """The folder of a finished run."""
    folder = out / f"{recipe}-{seed}"
    if not (folder / "report.html").exists():
        settings = [f"seed={seed}", f"output_dir={folder}", "evaluation.num_test_prompts=512", *overrides]
        resume = ["resume_from_checkpoint=latest"] if (folder / "metrics.jsonl").exists() else []
        subprocess.run([sys.executable, "-m", "diffalign", "train", recipe, *settings, *resume], check=True)
    return folder


def read(folder):
    """(figures by name, metrics rows that hold a validation)."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f["name"]: f for f in summary["figures"]}, [r for r in rows if f"heldout/{ORACLE}" in r]


def over_seeds(figures):
    """Mean and 95 % t interval over seeds of each figure's difference; base and tuned means."""
    table = {}
    for name in figures[0]:
        base, tuned, gain = (np.array([f[name][key] for f in figures]) for key in ("base", "tuned", "difference"))
        half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
        table[name] = {
            "base": base.mean(), "tuned": tuned.mean(), "gain": gain.mean(), "half_width": half, "by_seed":
            gain.tolist(),
        }  # fmt: skip
    return table


def table(results):
    lines = ["| recipe | figure | base | tuned | gain (95 % over seeds) | by seed |", "|---|---|---|---|---|---|"]
    for recipe, figures in results.items():
        for name, f in figures.items():
            seeds = ", ".join(f"{g:+.3f}" for g in f["by_seed"])
            gain = f"{f['gain']:+.3f} ± {f['half_width']:.3f}"
            lines.append(f"| {recipe} | {name} | {f['base']:.3f} | {f['tuned']:.3f} | {gain} | {seeds} |")
    return "\n".join(lines) + "\n"


def draw(curves, path):
    """Proxy and oracle on the validation prompts against training steps, one panel a recipe, one line a seed."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 3.8), squeeze=False)
    for axis, (recipe, runs) in zip(axes[0], curves.items(), strict=True):
        other = axis.twinx()
        for rows in runs:
            steps = [r["step"] for r in rows]
            axis.plot(steps, [r[f"heldout/{ORACLE}"] for r in rows], color="tab:blue")
            other.plot(steps, [r[f"validation/{PROXY}"] for r in rows], color="tab:orange", linestyle="--")
        axis.set(title=recipe, xlabel="training step")
        axis.set_ylabel("oracle: all correct", color="tab:blue")
        other.set_ylabel(f"proxy: {PROXY}", color="tab:orange")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["shapes-sd-alignprop", "shapes-sd3-alignprop"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/alignprop"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    results, curves = {}, {}
    for recipe in args.recipes:
        read_runs = [read(run(recipe, seed, args.out, args.overrides)) for seed in args.seeds]
        results[recipe] = over_seeds([figures for figures, _ in read_runs])
        curves[recipe] = [rows for _, rows in read_runs]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "results.md").write_text(table(results))
    draw(curves, args.out / "curves.png")
    print(table(results))


if __name__ == "__main__":
    main()
