"""The first test prompts as the base draws them, as a search does, and as a policy that was trained does.

    python -m tests.benchmarks.methods --only ddpo_long --seeds 0
    python -m tests.benchmarks.method_gallery --methods runs/methods --plot runs/method-gallery.png

Nothing is chosen: the first prompts, and the first image or the best of the first n by the training reward, from the
noise of the benchmark's seed 0. A frame says what the oracle says.
"""

import argparse
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from diffalign.config import load_recipe
from diffalign.engine.evaluate import Evaluation
from diffalign.engine.load import load_policy
from tests.benchmarks.methods import METHODS, drawn

PROMPTS, METHOD = 12, METHODS["ddpo_long"]
ROWS = {"base": (False, 1), "best of 8": (False, 8), "ddpo_long": (True, 1), "ddpo_long,\nbest of 2": (True, 2)}


def plot(rows: dict[str, Evaluation], path: Path) -> None:
    """A row of images for each way, framed in green where the oracle finds all correct."""
    figure, axes = plt.subplots(len(rows), PROMPTS, figsize=(PROMPTS, len(rows) + 0.5), layout="constrained")
    for line, (name, found) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        verdicts = found.scores["shapes-oracle"].tolist()
        for axis, image, right in zip(line, found.images, verdicts, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="#2a9d5c" if right == 1 else "#d0d0d0", linewidth=2)
    for axis, prompt in zip(axes[0], next(iter(rows.values())).prompts, strict=True):
        axis.set_title(fill(prompt.text, 16), fontsize=6)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=Path, default=Path("runs/methods"), help="where the benchmark's runs are")
    parser.add_argument("--plot", type=Path, default=Path("runs/method-gallery.png"))
    args = parser.parse_args()
    policy, rows = load_policy(load_recipe(METHOD.recipe).pipeline), {}
    for name, (tuned, n) in ROWS.items():  # those of the base come first
        if tuned and not policy.trainable():
            policy.load_lora(str(args.methods / "ddpo_long.0" / "lora"))
        rows[name] = drawn(policy, METHOD.pipeline, 0, n=n, count=PROMPTS, images=1)
    plot(rows, args.plot)


if __name__ == "__main__":
    main()
