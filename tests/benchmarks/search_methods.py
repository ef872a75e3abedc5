"""Searches on a pipeline of the zoo beside best-of-n, at equal denoiser evaluations, the oracle held out.

    python -m tests.benchmarks.search_methods --prompts 10 --out runs/search-methods

Prompts are those of the validation split's first 64 whose samples, drawn with a seed of their own, have the lowest mean
reward. Each job (a method, a budget, a seed; all prompts side by side) leaves a file in `--out`, and is not run again;
`--tables` prints what is there. Best-of-n's and SVDD's samples are independent: at lower budgets theirs is the exact
mean over subsets of the seed's pool. A tree is read at every mark of one run. SMC runs at each budget with as many
particles as it pays for. The policy computes in bfloat16, compiled.
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
from tests.benchmarks.search_tables import draw, tables

BRANCHES = [0, 0.2, 0.4, 0.6, 0.8]
METHODS = {
    "best-of-n": ("best_of_n", {}),
    "tree search": ("tree_search", {}),
    "tree search, the paper's": ("tree_search", {"widening": 2.0, "widening_alpha": 0.8, "branch_levels": BRANCHES}),
    "SVDD": ("svdd", {"num_children": 4, "choice": "highest"}),
    "SMC": ("smc", {"potential": "max", "target_lambda": 100.0, "resample_levels": BRANCHES}),
}
JOBS = [  # (method, NFE, seed), the most telling first
    ("best-of-n", 100_000, 0),
    *(("tree search", 10_000, seed) for seed in (0, 1)),
    *(("SMC", 1_000, seed) for seed in (0, 1)),
    *((name, 10_000, seed) for seed in (0, 1) for name in ("SVDD", "SMC")),
    ("tree search, the paper's", 10_000, 0),
    ("best-of-n", 100_000, 1),
    *((name, 100_000, seed) for seed in (0, 1) for name in ("tree search", "SMC", "SVDD")),
]


def verdicts(space, results, prompt):
    """The oracle of every result of a prompt, (n,)."""
    images = torch.cat([space.policy.decode(part) for part in results.split(128)])
    return judge(images, [space.prompts[prompt].text] * len(images)).all_correct.double().numpy()


def hardest(policy, reward, chain, count):
    """The prompts of the lowest mean reward over four samples."""
    prompts = read_prompts("prompts:shapes-validation")[:64]
    space = PolicySpace(policy, reward, prompts, chain.model_copy(update={"seed": 1000}))
    found = search_class("best_of_n")().run(space, Budget(reward_calls=4))
    order = np.argsort([float(each.rewards.mean()) for each in found])
    return [prompts[i] for i in order[:count]]


def marks_of(nfe):
    """Evaluations at which curves are read: four a decade from 1,000 on."""
    marks = (10 ** (np.arange(12, 25) / 4)).round().astype(int)
    return marks[marks <= nfe]


def independent(space, name, found, nfe):
    """Exact means of the best reward, and of its verdict, over subsets of independent samples."""
    samples = [(each.rewards.numpy(), verdicts(space, each.results, p)) for p, each in enumerate(found)]
    groups = METHODS[name][1].get("num_children", 1)  # SVDD's last children belong together: the best of each stands
    best = [(r.reshape(-1, groups), g.reshape(-1, groups)) for r, g in samples]
    best = [(r.max(1), np.take_along_axis(g, r.argmax(1)[:, None], 1)[:, 0]) for r, g in best]
    counts = [max(1, int(mark * len(best[0][0]) // nfe)) for mark in marks_of(nfe)]
    return {
        "reward": [expected_best(r, counts).tolist() for r, _ in best],
        "oracle": [best_of_n(r, g, counts).tolist() for r, g in best],
        "pool": [r.tolist() for r, _ in best],
        "gold": [g.tolist() for _, g in best],
    }


def anytime(space, found, marks):
    """The best reward so far at each mark, and its verdict."""
    reward, oracle = [], []
    for prompt, each in enumerate(found):
        spent, order = each.nfe.numpy(), each.rewards.numpy()
        at = [int(order[: (spent <= mark).sum()].argmax()) for mark in marks]
        gold = verdicts(space, each.results[at], prompt)
        reward.append(order[at].tolist())
        oracle.append(gold.tolist())
    return {"reward": reward, "oracle": oracle}


def run_job(space, name, nfe):
    """Run a job, and return its file's content."""
    method, settings = METHODS[name]
    started = time.perf_counter()
    found = search_class(method)(**settings).run(space, Budget(nfe=nfe))
    seconds = time.perf_counter() - started
    if method in ("best_of_n", "svdd"):
        marks, row = marks_of(nfe), independent(space, name, found, nfe)
    else:
        marks = [nfe] if method == "smc" else marks_of(nfe)
        row = anytime(space, found, marks)
    calls = float(np.mean([each.ledger.reward_calls for each in found]))
    return {"marks": np.asarray(marks).tolist(), "seconds": seconds, "reward_calls": calls, **row}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--most", type=int, default=100_000, help="no job of more denoiser evaluations a prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/search-methods"))
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        policy, reward = Policy.from_pretrained("zoo:shapes-sd", dtype=torch.bfloat16), rewards.load("shapes-clip")
        policy.denoiser.compile()
        policy.pipe.vae.decoder.compile()
        chain = ChainConfig(num_inference_steps=10, guidance_scale=3.0, micro_batch_size=128)
        prompts = hardest(policy, reward, chain, args.prompts)
        for name, nfe, seed in JOBS:
            path = args.out / f"{name.replace(' ', '-')}.{nfe}.{seed}.json"
            if nfe > args.most or path.exists():
                continue
            space = PolicySpace(policy, reward, prompts, chain.model_copy(update={"seed": seed}))
            result = run_job(space, name, nfe) | {"method": name, "nfe": nfe, "seed": seed}
            path.write_text(json.dumps(result))
            print(f"{name}, {nfe} NFE, seed {seed}: {np.mean(result['reward'], 0)[-1]:.4f}", flush=True)
            print(f"oracle {np.mean(result['oracle'], 0)[-1]:.3f}, {result['seconds']:.0f} s", flush=True)
    files = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    tables(files)
    draw(files, args.out / "curves.png")


if __name__ == "__main__":
    main()
