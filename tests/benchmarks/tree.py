"""Tree search: many leaves in a batch beside one at a time, and predictions kept at branching nodes beside made anew.

    python -m tests.benchmarks.tree [--prompts 4] [--nfe 640] [--leaf-batch 1 4 16 64] [--out results.json]

Several leaves: all ways spend the same denoiser evaluations on every prompt; the first goes prompt after prompt, one
leaf at a time, the others search the prompts side by side. Beside each the bound: the seconds that the denoiser alone
takes for the batches that this search gave it, timed in the same run, before and after all ways, at batch sizes between
which lines are drawn. The search can be no faster. Decoding and scoring come on top.

Kept predictions: two searches grow the same trees, and the second evaluates the denoiser once more for every leaf that
branches from a node. The ledger's ratio of evaluations is the bound of the ratio of times.

On a CPU seconds are those of one thread's own work, so that other programs count little.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from diffalign import rewards
from diffalign.data import read_prompts
from diffalign.policies import Policy
from diffalign.search import Budget, PolicySpace, tree
from diffalign.search.config import ChainConfig
from diffalign.search.tree_search import TreeSearch

SIZES = (1, 2, 4, 8, 16, 32, 64)


class Watched(PolicySpace):
    """Notes the rows of every evaluation."""

    def start(self):
        super().start()
        self.batches = []

    def evaluate(self, rows):
        self.batches.append(len(rows))
        return super().evaluate(rows)


def clock(device):
    """Seconds so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def machine(device):
    """What runs this."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"one thread of {names[0] if names else platform.processor() or platform.machine()}"


@torch.no_grad()
def denoiser_seconds(policy, reward, prompts, chain):
    """Seconds of one evaluation of the guided denoiser at `SIZES` rows, the shortest of three."""
    space, taken = Watched(policy, reward, prompts, chain), []
    for size in SIZES:
        which = torch.arange(size) % len(prompts)
        rows, times = space.initial(which, [(i,) for i in range(size)]), []
        for _ in range(4):
            begun = clock(policy.device)
            space.evaluate(rows)
            times.append(clock(policy.device) - begun)
        taken.append(min(times[1:]))
    return np.array(taken)


def searched(spaces, budget, leaf_batch):
    """A tree in every space: leaves, best rewards, evaluations, batches and seconds."""
    begun, found, batches = clock(spaces[0].device), [], []
    for space in spaces:
        found += TreeSearch(leaf_batch=leaf_batch).run(space, budget)
        batches += space.batches
    return {
        "leaves": sum(len(each) for each in found),
        "best": [each.reward for each in found],
        "evaluations": sum(each.ledger.denoiser_evaluations for each in found),
        "batches": batches,
        "seconds": clock(spaces[0].device) - begun,
    }


def made_anew():
    """A tree that keeps no predictions: evaluates the denoiser again where a rollout leaves a node."""
    kept = tree._first

    def first(space, trees, chains):
        branched = [k for k, chain in enumerate(chains) if chain[0].parent.parent is not None]
        rows, outputs = kept(space, trees, chains)
        if branched:
            outputs[branched] = space.predict(rows[branched])
        return rows, outputs

    return mock.patch.object(tree, "_first", first)


def by_leaf_batch(policy, reward, prompts, chain, args):
    """One row for every way."""
    before = denoiser_seconds(policy, reward, prompts, chain)
    together = [Watched(policy, reward, prompts, chain)]
    ways = {"prompt after prompt, 1": (1, [Watched(policy, reward, [p], chain) for p in prompts])}
    ways |= {f"side by side, {count}": (count, together) for count in args.leaf_batch}
    searched([*together, *ways["prompt after prompt, 1"][1]], Budget(reward_calls=1), 1)  # to warm up
    table = {name: searched(spaces, Budget(nfe=args.nfe), count) for name, (count, spaces) in ways.items()}
    costs = np.minimum(before, denoiser_seconds(policy, reward, prompts, chain))
    told = ", ".join(f"{size}: {1000 * cost / size:.1f}" for size, cost in zip(SIZES, costs, strict=True))
    print(f"the denoiser alone, ms a row by rows in a batch: {told}")
    first = next(iter(table.values()))
    for name, row in table.items():
        row["bound_seconds"] = float(np.interp(row["batches"], SIZES, costs).sum())
        rates = [row["leaves"] / row["seconds"], row["leaves"] / row["bound_seconds"]]
        speed = (row["evaluations"] / row["seconds"]) / (first["evaluations"] / first["seconds"])
        gain = np.array(row["best"]) - np.array(first["best"])
        print(
            f"{name:23s}: {row['leaves']:4d} images, {rates[0]:5.2f} a second (bound {rates[1]:5.2f}), "
            f"{rates[0] / first['leaves'] * first['seconds']:.2f} times the first; {row['evaluations']} evaluations, "
            f"{speed:.2f} times as many a second; {np.mean(row['batches']):4.1f} rows a batch; "
            f"best {np.mean(row['best']):.4f}, {gain.mean():+.4f} +- {1.96 * gain.std(ddof=1) / len(gain) ** 0.5:.4f}"
        )
    return {"denoiser_seconds": dict(zip(SIZES, costs.tolist(), strict=True)), "ways": table}


def by_caching(policy, reward, prompts, chain, args):
    """The same trees with predictions kept and made anew."""
    space, budget = [Watched(policy, reward, prompts, chain)], Budget(reward_calls=args.leaves)
    kept = searched(space, budget, 4)
    with made_anew():
        anew = searched(space, budget, 4)
    away = float(np.abs(np.array(kept["best"]) - np.array(anew["best"])).max())
    work, time_ = (anew[each] / kept[each] for each in ("evaluations", "seconds"))
    print(
        f"{kept['leaves']} leaves: {kept['evaluations']} evaluations where predictions are kept, {anew['evaluations']} "
        f"where not, {work:.3f} times as many; {time_:.3f} times the seconds (bound {work:.3f}); best rewards differ "
        f"by {away:.1e}"
    )
    return {"kept": kept, "anew": anew, "evaluations_ratio": work, "seconds_ratio": time_, "largest_difference": away}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="zoo:shapes-sd")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--nfe", type=int, default=640, help="of each prompt")
    parser.add_argument("--leaf-batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--leaves", type=int, default=48, help="of each prompt, where caching is measured")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, reward = Policy.from_pretrained(args.pipeline), rewards.load("shapes-clip")
    prompts = read_prompts("prompts:shapes-validation")[: args.prompts]
    chain = ChainConfig(num_inference_steps=10, guidance_scale=3.0, micro_batch_size=64)
    print(
        f"{args.pipeline}, {args.prompts} prompts, {args.nfe} evaluations each, {machine(policy.device)}, "
        f"torch {torch.__version__}"
    )
    results = {"machine": machine(policy.device), "settings": {name: str(value) for name, value in vars(args).items()}}
    results["leaf_batch"] = by_leaf_batch(policy, reward, prompts, chain, args)
    results["caching"] = by_caching(policy, reward, prompts, chain, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
