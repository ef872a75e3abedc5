"""A small search: a tiny random pipeline, a reward that reads a colour, and the recipe. Also a program that is killed.

    python searches.py OUT

Runs the recipe whole, and again killed at chosen moments and gone on with, each in a process of its own that SIGKILL
ends without a chance to clean up.
"""

import os
import signal
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  once, and not in every process
import torch

from diffalign.engine.search import search
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from diffalign.rewards import REWARDS, as_reward
from diffalign.search import search_class
from diffalign.search.space import Space
from diffalign.search_recipe import load_search_recipe

RECIPE = """
pipeline: {path: model}
method: {name: tree_search, leaf_batch: 3, branch_levels: [0.0, 0.5], widening: 1.0, widening_alpha: 0.5}
num_inference_steps: 4
guidance_scale: 2.0
budget: {nfe: 60}
rewards: {train: [red], heldout: [blue]}
prompts: [a bad dog, a fine lake, a cat]
prompts_per_batch: 2
report_pool: true
output_dir: runs/x
"""
# What is counted, and at which count the process dies. Syncs of a batch: six images and traces, then its rows.
MOMENTS = {"settings": ("fsync", 1), "image": ("fsync", 11), "rows": ("fsync", 8), "search": ("predict", 25)}


def colour(channel):
    """The mean of a colour, of which dark images have none."""

    def values(images, prompts, metadata):
        means = images[:, channel].double().mean((1, 2))
        return torch.where(means < 0.05, torch.nan, means)

    return values


def register(registry=REWARDS):
    """Makes the rewards known by name."""
    for channel, name in ((0, "red"), (2, "blue")):
        registry.register(name)(lambda channel=channel, name=name: as_reward(colour(channel), name))


def write(folder):
    """The recipe's file, and what it points to without any weight."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def arm(moment, kill, patch=setattr):
    """Has `kill` called at a moment."""
    what, left = MOMENTS[moment]
    owner = os if what == "fsync" else Space
    function = getattr(owner, what)

    def ticking(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            kill()
        return function(*args, **kwargs)

    patch(owner, what, ticking)


def run(recipe, policy, moment=None):
    """Exit status of a search in a process of its own; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        if moment:
            arm(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
        search(recipe, policy)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    search_class("tree_search")  # imported once: a file that changes meanwhile would change the search
    out, policy = Path(sys.argv[1]), Policy.wrap(tiny_sd())
    register()
    file = write(out)
    assert run(load_search_recipe(file, [f"output_dir={out}/whole"]), policy) == 0
    for name in MOMENTS:
        recipe = load_search_recipe(file, [f"output_dir={out}/{name}"])
        assert run(recipe, policy, name) == -signal.SIGKILL, name
        assert run(recipe, policy) == 0, name
