"""What `tests.benchmarks.search_methods` measured, as a table and a picture."""

import numpy as np

from diffalign.report.statistics import expected_best
from diffalign.search.weights import effective_size


def gather(files):
    """{(method, mark): (reward, oracle)} with a row for each run: the prompts of each seed."""
    rows = {}
    for each in sorted(files, key=lambda f: (-f["nfe"], f["seed"])):
        for k, mark in enumerate(each["marks"]):
            key = each["method"], mark
            rows.setdefault(key, {})
            if each["seed"] not in rows[key]:  # of a seed the longest run
                rows[key][each["seed"]] = [(r[k], g[k]) for r, g in zip(each["reward"], each["oracle"], strict=True)]
    return {key: {seed: np.array(value).T for seed, value in seeds.items()} for key, seeds in rows.items()}


def interval(values):
    """Mean, and 1.96 standard errors over runs."""
    return f"{values.mean():.4f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.4f}"


def importance(pool, gold, count, scale=100.0):
    """Mean reward, oracle and effective size of a draw by importance weights among `count`, over disjoint blocks."""
    import torch

    blocks = len(pool) // count
    r, g = (np.asarray(x)[: blocks * count].reshape(blocks, count) for x in (pool, gold))
    weights = torch.from_numpy(scale * r).softmax(1).numpy()
    size = effective_size(torch.from_numpy(scale * r)).mean()
    return (weights * r).sum(1).mean(), (weights * g).sum(1).mean(), float(size)


def tables(files):
    """Print reward and oracle at three budgets, what each is over best-of-n, and the evaluations best-of-n takes.

    A run is paired with best-of-n of the same prompt and seed. The pools of all seeds tell what best-of-n needs.
    """
    rows = gather(files)
    base = [each for each in files if each["method"] == "best-of-n"]
    pool, gold = (np.concatenate([each[key] for each in base]) for key in ("pool", "gold"))
    chain, most = base[0]["nfe"] // pool.shape[1], base[0]["nfe"]
    every = np.arange(1, pool.shape[1] + 1)
    means = np.stack([expected_best(each, every) for each in pool]).mean(0)
    print("| NFE | method | runs | reward | over best-of-n, paired | oracle | best-of-n needs |")
    print("|---|---|---|---|---|---|---|")
    for nfe in (1_000, 10_000, 100_000):
        if ("best-of-n", nfe) not in rows:
            continue
        plain = rows["best-of-n", nfe]
        for name in dict.fromkeys(name for name, mark in rows if mark == nfe):
            seeds = rows[name, nfe]
            reward, oracle = (np.concatenate([each[k] for each in seeds.values()]) for k in (0, 1))
            gain = [found[0] - plain[seed][0] for seed, found in seeds.items() if seed in plain]
            above = np.nonzero(means >= reward.mean())[0]
            needs = f"{(above[0] + 1) * chain / nfe:.2f} times" if len(above) else f"> {most / nfe:.0f} times"
            over = interval(np.concatenate(gain)) if gain else ""
            told = ("", "1") if name == "best-of-n" else (over, needs)
            print(
                f"| {nfe} | {name} | {len(reward)} | {interval(reward)} | {told[0]} | {interval(oracle)} | {told[1]} |"
            )
        drawn = np.array([importance(r, g, nfe // chain) for r, g in zip(pool, gold, strict=True)])
        told = f"{interval(drawn[:, 0])} | | {interval(drawn[:, 1])} | |"
        print(f"| {nfe} | a draw by importance, effective size {drawn[:, 2].mean():.1f} | {len(pool)} | {told}")
    for each in files:
        print(f"{each['method']}, {each['nfe']} NFE, seed {each['seed']}:", end=" ")
        print(f"{each['seconds'] / len(each['reward']):.0f} s and {each['reward_calls']:.0f} reward calls a prompt")


def draw(files, path):
    """Mean best reward against evaluations, over prompts and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows = gather(files)
    for name in dict.fromkeys(name for name, _ in rows):
        points = sorted(
            (mark, np.mean([s[0].mean() for s in seeds.values()])) for (n, mark), seeds in rows.items() if n == name
        )
        style = {"color": "black", "linestyle": "--"} if name == "best-of-n" else {"marker": "o", "markersize": 3}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xscale="log", xlabel="denoiser evaluations for a prompt", ylabel="best reward (shapes-clip), mean")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
