"""Searches on a pipeline of the zoo beside best-of-n: reward at equal denoiser evaluations, the oracle held out.

    python tests/benchmarks/search_methods.py --prompts 12 --nfe 2000 --out results

Best-of-n is one pool of `--factor` times the budget, and its curve the exact mean over subsets of it. For each method:
the best reward at the budget, paired with best-of-n's over prompts; how many evaluations best-of-n takes to that value;
and the oracle's verdict of the image that each would hand over. Prompts are those of the validation split's first 64
whose samples, drawn with another seed, have the lowest mean reward.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from diffalign import rewards
from diffalign.data import read_prompts
from diffalign.policies import Policy
from diffalign.report.statistics import expected_best
from diffalign.search import Budget, PolicySpace, search_class
from diffalign.search.config import ChainConfig
from diffalign.zoo.oracle import judge
from tests.benchmarks.best_of_n import best_of_n

METHODS = {
    "tree search": ("tree_search", {}),
    "tree search, the paper's widening": (
        "tree_search",
        {"widening": 2.0, "widening_alpha": 0.8, "branch_levels": [0, 0.2, 0.4, 0.6, 0.8]},
    ),
    "SVDD, 4 children, the highest": ("svdd", {"num_children": 4, "choice": "highest"}),
    "SMC, max": ("smc", {"potential": "max", "target_lambda": 100.0}),
}


def verdicts(space, results, prompt):
    """The oracle of every result of a prompt, (n,)."""
    images = torch.cat([space.policy.decode(part) for part in results.split(64)])
    return judge(images, [space.prompts[prompt].text] * len(images)).all_correct.double().numpy()


def pool_of(space, nfe):
    """(rewards, verdicts), each (P, N), of independent samples."""
    found = search_class("best_of_n")(wave=64).run(space, Budget(nfe=nfe))
    gold = [verdicts(space, each.results, prompt) for prompt, each in enumerate(found)]
    return np.stack([each.rewards.numpy() for each in found]), np.stack(gold)


def measured(space, method, settings, nfe, marks):
    """Best rewards at some evaluations (P, K), the oracle of the best (P,), and seconds."""
    started = time.perf_counter()
    found = search_class(method)(**settings).run(space, Budget(nfe=nfe))
    seconds = time.perf_counter() - started
    curves = []
    for each in found:
        curve, spent = each.curve().numpy(), each.nfe.numpy()
        curves.append([curve[spent <= mark][-1] if (spent <= mark).any() else np.nan for mark in marks])
    gold = [verdicts(space, each.results[[each.best]], prompt)[0] for prompt, each in enumerate(found)]
    return np.array(curves), np.array(gold), seconds


def hardest(policy, reward, chain, count):
    """The prompts of the lowest mean reward over four samples."""
    prompts = read_prompts("prompts:shapes-validation")[:64]
    space = PolicySpace(policy, reward, prompts, chain.model_copy(update={"seed": 1}))
    found = search_class("best_of_n")().run(space, Budget(reward_calls=4))
    order = np.argsort([float(each.rewards.mean()) for each in found])
    return [prompts[i] for i in order[:count]]


def interval(values):
    """Mean, and 1.96 standard errors over prompts."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def equal_cost(pool, value, chain):
    """Evaluations at which best-of-n's mean reaches a value; None where the pool is too small for it."""
    means = np.stack([expected_best(each, np.arange(1, pool.shape[1] + 1)) for each in pool]).mean(0)
    above = np.nonzero(means >= value)[0]
    return int(above[0] + 1) * chain if len(above) else None


def draw(results, path):
    """Mean best reward against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in results["curves"].items():
        style = {"color": "black", "linestyle": "--"} if name == "best-of-n" else {"marker": "o", "markersize": 3}
        axes.plot(row["nfe"], row["reward"], label=name, **style)
    axes.set(xscale="log", xlabel="denoiser evaluations for a prompt", ylabel="best reward (shapes-clip), mean")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="zoo:shapes-sd")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--nfe", type=int, default=2000)
    parser.add_argument("--factor", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/search-methods"))
    args = parser.parse_args()
    chain = ChainConfig(num_inference_steps=args.steps, guidance_scale=3.0, micro_batch_size=64)
    policy, reward = Policy.from_pretrained(args.pipeline), rewards.load("shapes-clip")
    space = PolicySpace(policy, reward, hardest(policy, reward, chain, args.prompts), chain)
    cost = sum(space.evaluations)
    marks = np.geomspace(4 * cost, args.nfe, 10).astype(int).tolist()
    pool, gold = pool_of(space, args.nfe * args.factor)
    n, counts = args.nfe // cost, [max(1, mark // cost) for mark in marks]
    base = np.stack([expected_best(each, counts) for each in pool])
    truth = np.stack([best_of_n(r, g, [n])[0] for r, g in zip(pool, gold, strict=True)])
    wide = np.unique(np.geomspace(1, pool.shape[1], 30).astype(int))
    results = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "rows": {"best-of-n": {"reward": interval(base[:, -1]), "oracle": interval(truth)}},
        "curves": {
            "best-of-n": {
                "nfe": (wide * cost).tolist(),
                "reward": np.stack([expected_best(each, wide) for each in pool]).mean(0).tolist(),
            }
        },
    }
    for name, (method, settings) in METHODS.items():
        curves, verdict, seconds = measured(space, method, settings, args.nfe, marks)
        mean, gain = interval(curves[:, -1]), interval(curves[:, -1] - base[:, -1])
        equal = equal_cost(pool, mean[0], cost)
        results["rows"][name] = {
            "reward": mean,
            "over best-of-n": gain,
            "oracle": interval(verdict),
            "best-of-n needs": equal,
            "seconds": seconds,
        }
        results["curves"][name] = {"nfe": marks, "reward": np.nanmean(curves, 0).tolist()}
        told = "more than the pool has" if equal is None else f"{equal / args.nfe:.2f} of the budget"
        print(
            f"{name}: {mean[0]:.4f}, over best-of-n {gain[0]:+.4f} +- {gain[1]:.4f}; best-of-n needs {told}; ", end=""
        )
        print(f"oracle {verdict.mean():.2f} (best-of-n {truth.mean():.2f}); {seconds:.0f} s", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        draw(results, args.out / "curves.png")


if __name__ == "__main__":
    main()
