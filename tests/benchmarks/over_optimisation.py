"""Over-optimisation in the shapes world, where truth is known: gold against proxy as best of n, for n up to 1,000.

    python tests/benchmarks/over_optimisation_images.py [--out runs/over_optimisation]  # half an hour; resumable
    python tests/benchmarks/over_optimisation.py [--out runs/over_optimisation]          # minutes

Gao et al. (2023), arXiv:2210.10760, with the oracle as gold. It may be run while images are still drawn: it takes the
parts that are there. Writes results.json, results.md, gold_by_n.png and gold_by_proxy.png into `--out`.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import over_optimisation_proxies as proxies
from tests.benchmarks.best_of_n import best_of_n, kl
from tests.benchmarks.over_optimisation_images import (
    GUIDANCE,
    REFERENCES,
    STEPS,
    TRAIN_PROMPTS,
    TRAIN_SAMPLES,
    arguments,
    prompts,
)

WAYS = ("one member", "mean", "WCO", "UWO", "log-sigmoid", "PAR", "WCO of PAR", *proxies.ZOO)
GOLD = ("all_correct", "fraction")
MEMBERS = [f"member-{k + 1}" for k in range(proxies.MEMBERS)]
MARKS = (1, 4, 16, 64, 256, 1000)
RESAMPLES = 2000
PAIRED = 200
"""Samples of each prompt whose pairs count for pairwise accuracy."""


def interval(values, weights):
    """Mean over prompts and its 95 % bootstrap interval, of (P, ...) under weights (RESAMPLES, P): three arrays."""
    means = np.tensordot(weights, values, axes=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return values.mean(0), low, high


def resamples(count):
    """Weights (RESAMPLES, P) of as many draws of P prompts with replacement."""
    return np.random.default_rng(0).multinomial(count, [1 / count] * count, size=RESAMPLES) / count


def with_one_member(by_way):
    """Adds what to expect of one member: the mean over the members of each number."""
    return {"one member": np.mean([by_way[name] for name in MEMBERS], axis=0), **by_way}


def curves(scores, facts):
    """(counts, way -> gold and proxy (P, counts, 3)): what best of n is worth on each prompt.

    The proxy is in standard deviations over the samples of a prompt.
    """
    total = len(scores["mean"][0])
    counts = np.union1d(np.geomspace(1, total, 40).round().astype(int), [n for n in MARKS if n <= total])
    gold, found = [facts[name].double().numpy()[:, -total:] for name in GOLD], {}
    for way, column in scores.items():
        proxy = column.double().numpy()
        standard = (proxy - proxy.mean(1, keepdims=True)) / proxy.std(1, keepdims=True)
        each = zip(proxy, standard, *gold, strict=True)
        found[way] = np.stack([best_of_n(p, np.stack(rows, 1), counts) for p, *rows in each])
    return counts, with_one_member(found)


def summarised(counts, by_way):
    """Way -> means with intervals over prompts, and the paired difference from one member."""
    weights = resamples(len(by_way["mean"]))
    found = {}
    for way, values in by_way.items():
        parts = interval(values, weights)
        paired = interval(values - by_way["one member"], weights)
        found[way] = {name: [part[:, i].tolist() for part in parts] for i, name in enumerate(("proxy", *GOLD))}
        found[way]["over one member"] = [part[:, 1].tolist() for part in paired]
        found[way] |= {"n": counts.tolist(), "kl": kl(counts).tolist()}
    return found


def accuracies(scores, fraction):
    """Way -> pairwise accuracy against the oracle's fraction of true facts, under both tie conventions.

    ``decided``: of the pairs that the oracle decides, equal proxies half right. ``with ties``: of all pairs, three
    outcomes, the proxy ties where it differs by at most the threshold that is best for it on these very pairs, as in
    Deutsch et al. (2023), arXiv:2305.14324. Intervals over prompts, the threshold kept.
    """
    i, j = np.triu_indices(min(PAIRED, len(scores["mean"][0])), 1)
    rest = fraction.numpy()[:, -len(scores["mean"][0]) :]
    truth = np.sign((rest[:, i] - rest[:, j]).round(6))
    found = {}
    for way, proxy in scores.items():
        difference = proxy.double().numpy()[:, i] - proxy.double().numpy()[:, j]
        told = np.where(np.abs(difference) <= best_threshold(difference, truth), 0, np.sign(difference))
        right = np.where(difference == 0, 0.5, np.sign(difference) == truth)
        decided = np.where(truth == 0, 0, right).sum(1) / (truth != 0).sum(1)
        found[way] = np.stack([decided, (told == truth).mean(1)], 1)
    weights = resamples(len(rest))
    named = {way: interval(values, weights) for way, values in with_one_member(found).items()}
    kinds = enumerate(("decided", "with ties"))
    return {k: {way: [float(x[i]) for x in v] for way, v in named.items()} for i, k in kinds}, (truth == 0).mean()


def best_threshold(difference, truth):
    """The largest difference that is to be called a tie, for the most right answers; below 0: none."""
    size = np.abs(difference).ravel()
    order = np.argsort(size)
    gain = np.where(truth == 0, 1, -(np.sign(difference) == truth).astype(int)).ravel()[order].cumsum()
    return size[order[gain.argmax()]] if gain.max() > 0 else -1.0


def favourite_worst(scores):
    """Share of a prompt's samples, mean over prompts, of which the most frequent worst member is the worst.

    1 / K for members whose offsets on a prompt agree; near 1 WCO is that member, another one on each prompt.
    """
    worst = np.stack([scores[name].numpy() for name in MEMBERS]).argmin(0)
    return float(np.mean([np.bincount(row).max() / len(row) for row in worst]))


def at(curve, n):
    """Index of the count nearest to n."""
    return int(np.abs(np.array(curve["n"]) - n).argmin())


def table(results):
    """Markdown: accuracy, gold at a few n, and the difference from one member at the last, of each way."""
    last = results["curves"]["mean"]["n"][-1]
    marks = [n for n in MARKS if n <= last]
    marks += [last] * (last not in marks)
    late = max(n for n in marks if n <= last / 2)
    head = ["proxy", "accuracy, decided", "accuracy, with ties", *(f"best of {n}" for n in marks)]
    head += [f"peak up to {late} (n)", f"over one member, n = {late}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for way, curve in results["curves"].items():
        cells = [way]
        for kind in results["accuracy"].values():
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*kind[way]) if way in kind else "")
        gold = curve["all_correct"]
        cells += [f"{gold[0][at(curve, n)]:.3f}" for n in marks]
        peak = int(np.argmax(gold[0][: at(curve, late) + 1]))  # near N there is one subset to average over
        cells.append(f"{gold[0][peak]:.3f} ({curve['n'][peak]})")
        cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*(part[at(curve, late)] for part in curve["over one member"])))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_by_n(found, path):
    """Does gold fall as n grows, and do ensembles help? Gold against n, a band for the first and the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.4))
    for axis, gold in zip(axes, GOLD, strict=True):
        for k, way in enumerate(WAYS):
            curve, style = found[way], "--" if way in proxies.ZOO else "-"
            mean, low, high = curve[gold]
            axis.plot(curve["n"], mean, style, color=f"C{k}", label=way)
            if way in ("one member", "mean"):
                axis.fill_between(curve["n"], low, high, color=f"C{k}", alpha=0.15, linewidth=0)
        for name in MEMBERS:
            axis.plot(found[name]["n"], found[name][gold][0], color="C0", linewidth=0.6, alpha=0.6)
        axis.plot(found["oracle"]["n"], found["oracle"][gold][0], ":", color="black", label="the oracle itself")
        axis.set(xscale="log", xlabel="n", ylabel=f"oracle: {gold.replace('_', ' ')}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    axes[0].set_title("best of n by a proxy; thin: each member", fontsize=10)
    axes[1].set_title("bands: 95 % over prompts", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=110)


def draw_by_proxy(found, path):
    """What does a gain in proxy buy? Gold against proxy, each with KL, one panel a way."""
    figure, axes = plt.subplots(3, 3, figsize=(11, 8), sharex=True)
    for axis, way in zip(axes.flat, WAYS, strict=True):
        other, curve = axis.twinx(), found[way]
        for side, name, color in ((axis, "all_correct", "tab:blue"), (other, "proxy", "tab:orange")):
            mean, low, high = curve[name]
            side.plot(curve["kl"], mean, color=color)
            side.fill_between(curve["kl"], low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(title=way, ylim=(0, 1), xlabel="KL bound, nats")
        other.set_ylim(0, 4)
    axes[1, 0].set_ylabel("oracle: all correct (blue)")
    figure.text(0.99, 0.5, "proxy, standard deviations (orange)", rotation=270, va="center", ha="right")
    figure.tight_layout(rect=(0, 0, 0.97, 1))
    figure.savefig(path, dpi=110)


def main():
    args = arguments(__doc__)
    captions, taught = prompts("validation", args.prompts), prompts("train", TRAIN_PROMPTS)
    training = proxies.look(args.out, "train", taught, TRAIN_SAMPLES)
    members, fits = proxies.train_members(args.out, training, taught)
    training = proxies.add_members(training, taught, members)
    facts = proxies.look(args.out, "validation", captions, args.samples)
    facts = proxies.add_members(facts, captions, members)
    scores = proxies.proxies(facts, captions, training, REFERENCES)
    accuracy, ties = accuracies(scores, facts["fraction"])
    scores["oracle"] = facts["fraction"][:, REFERENCES:]  # the most that a choice can reach
    results = {
        "setting": {
            "pipeline": "zoo:shapes-sd", "steps": STEPS, "guidance": GUIDANCE, "prompts": captions,
            "samples": len(scores["mean"][0]), "references": REFERENCES, "pairs": proxies.PAIRS,
            "label_noise": proxies.NOISE, "members": proxies.MEMBERS, "uwo_penalty": proxies.PENALTY,
            "oracle_ties": float(ties),
        },
        "members": fits,
        "favourite_worst": favourite_worst(scores),
        "accuracy": accuracy,
        "curves": summarised(*curves(scores, facts)),
    }  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "results.md").write_text(table(results))
    draw_by_n(results["curves"], args.out / "gold_by_n.png")
    draw_by_proxy(results["curves"], args.out / "gold_by_proxy.png")
    print(table(results))


if __name__ == "__main__":
    main()
