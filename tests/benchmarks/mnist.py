"""The class-conditional experiment of DTS on real digits, in small: samplers of p(x) exp(r(x)) at equal evaluations.

    python -m tests.benchmarks.mnist --data FOLDER --out FOLDER [--nfe 1000 10000 100000] [--seeds 3]

After Jain et al. 2025 (arXiv 2506.20701), section 4 and table 1: p is a diffusion prior of MNIST (50 steps, DDIM of
eta = 1), r = max over some classes c of log p(c | x) by a classifier, and the targets are the ten digits, the even and
the odd ones. FOLDER of --data holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz; checkpoints and results
are kept in --out, and a second call goes on where the first stopped.

As r is at most 0, rejection draws exactly from the target, and a large pool of the prior's samples gives its truth.
Every method hands over n draws, with replacement, and all are compared with the same exact draws by the Frechet
distance in the features of a second classifier, the judge; `exact draws` are n others from the pool: the floor.

Departures: images of 14 x 14 and a perceptron as the prior (`tests.benchmarks.mnist_models`), the Frechet distance to
exact draws of the target instead of to MNIST's images, n of 1,000 instead of 5,000, a tenth of the evaluations.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffalign.laws import DDIM
from diffalign.report.statistics import diversity
from diffalign.rewards.sets import FeatureStatistics, frechet_distance
from diffalign.search import Budget, search_class
from diffalign.search.best_of_n import rejected
from diffalign.search.space import GaussianSpace
from diffalign.search.weights import systematic
from tests.benchmarks.mnist_models import SIDE, models
from tests.search.digits import cosine_levels
from tests.search.problems import hashed_uniform

TARGETS = {str(digit): (digit,) for digit in range(10)} | {"even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)}
GROUPS = {"single digits": [str(digit) for digit in range(10)], "even and odd": ["even", "odd"]}
METHODS = {  # search, settings, how results are drawn
    "rejection": ("importance", {}, "rejected"),
    "importance": ("importance", {}, "weights"),
    "tree": ("tree_sampling", {}, "weights"),
    "tree, visited evenly": ("tree_sampling", {"select_lambda": 0.0}, "weights"),
    "tree, the paper's": (
        "tree_sampling",
        {"select_by": "rollouts", "branch_levels": [0.0, 0.2, 0.4, 0.6, 0.8], "widening_alpha": 0.8},
        "weights",
    ),
    "SMC": ("smc", {}, "weights"),
    "TDS": ("tds", {}, "weights"),
    "DAS": ("das", {}, "weights"),
    "DPS": ("guidance", {"kind": "dps", "wave": 64}, "all"),
}
PAPER = {  # table 1: FID of single digits, and of even and odd ones, at 1e6 evaluations
    "tree, the paper's": (0.014, 0.007),
    "DAS": (0.039, 0.031),
    "SMC": (0.060, 0.027),
    "TDS": (0.087, 0.053),
    "DPS": (0.359, 0.123),
}
SHOWN, COLUMNS = "4", 16


class MNIST(GaussianSpace):
    """p is the denoiser's; prompt i has r = max over the classes of its target of log p(class | x), at most 0."""

    def __init__(self, denoiser, classifier, targets=TARGETS, seed=0, steps=50):
        size = {"ids": list(targets), "seed": seed, "micro_batch_size": 1024}
        super().__init__(DDIM(1.0), cosine_levels(steps), (1, SIDE, SIDE), "v_prediction", **size)
        self.denoiser, self.classifier = denoiser, classifier
        self.wanted = torch.tensor([[label in classes for label in range(10)] for classes in targets.values()])

    def noise(self, purpose, prompts, paths, steps):
        """Addressed standard normal noise by Box-Muller, made for all rows at once."""
        addresses = [(self.seed, purpose, self.ids[p], *path) for p, path in zip(prompts.tolist(), paths, strict=True)]
        radius, angle = hashed_uniform(addresses, steps, SIDE**2).float().clamp(max=1 - 2**-24).chunk(2, 1)
        radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1).reshape(-1, *self.shape)

    def evaluate(self, rows):
        """V, at the precision of the denoiser's weights."""
        dtype = next(self.denoiser.parameters()).dtype
        return self.denoiser(rows.x.to(dtype), self.schedule.level(rows.steps).timestep).float()

    def rate(self, results, prompts):
        """r (B,), counted."""
        values = log_probability(self.classifier, results, self.wanted[prompts])
        self.count_scores(values, prompts)
        return values


def log_probability(classifier, images, wanted):
    """Max over wanted classes (B, 10) or (10,) of log p(class | x), (B,)."""
    return classifier(images).log_softmax(1).masked_fill(~wanted, -math.inf).amax(1)


class Judge:
    """Compares n draws with exact ones, for every target.

    Args:
        network: the second classifier.
        pool: (N, 1, 14, 14) independent samples of p.
        space: the targets and the reward's classifier.
        count: n; as many exact draws are set apart for the floor, the others are the reference.
    """

    def __init__(self, network, pool, space, count):
        self.network, self.classifier, self.wanted, self.count = network, space.classifier, space.wanted, count
        generator = torch.Generator().manual_seed(0)
        self.reference, self.exact = [], []
        for target, wanted in zip(space.ids, space.wanted, strict=True):
            log_p = torch.cat([log_probability(space.classifier, part, wanted) for part in pool.split(2048)])
            kept = pool[torch.rand(len(pool), generator=generator) < log_p.exp()]
            if len(kept) < 2 * count:
                raise ValueError(
                    f"{len(kept)} exact draws for {target!r} are too few for --draws {count}: raise --pool or lower it"
                )
            self.exact.append(kept[:count])
            self.reference.append(FeatureStatistics.of(self.features(kept[count:])))

    def features(self, images):
        """(B, 32) float64."""
        return torch.cat([self.network.features(part) for part in images.split(2048)]).double()

    def __call__(self, images, target):
        """Figures of draws (n, 1, 14, 14)."""
        features = self.features(images)
        return {
            "distance": float(frechet_distance(FeatureStatistics.of(features), self.reference[target])),
            "judge": float(log_probability(self.network, images, self.wanted[target]).mean()),
            "reward": float(log_probability(self.classifier, images, self.wanted[target]).mean()),
            "diversity": diversity(features.numpy(), [0] * len(features)).overall,
        }


def pool_of(denoiser, classifier, count, path):
    """Independent samples of p, (count, 1, 14, 14), from a file if it has as many."""
    if path.exists() and len(pool := load_file(path)["pool"]) == count:
        return pool
    space = MNIST(denoiser, classifier, {"any": tuple(range(10))}, seed=10_000)
    (found,) = search_class("best_of_n")(wave=1024).run(space, Budget(reward_calls=count))
    save_file({"pool": found.results}, path)
    return found.results


def drawn(found, how, count, seed):
    """Indices (count,) of draws; None where rejection kept nothing."""
    if how == "weights":
        return found.draw(count, seed)
    kept = rejected(found, 1.0, 0.0, seed) if how == "rejected" else torch.arange(len(found))
    return kept[systematic(torch.zeros(len(kept)), count, 0.5)] if len(kept) else None


def measure(space, judge, nfe, results, out):
    """Add to `results` what every method finds at a budget; methods of one search share its results."""
    found, ran, seconds = None, None, 0.0
    for name, (search, settings, how) in METHODS.items():
        key = f"{space.seed}/{nfe}/{name}"
        if key in results:
            continue
        if ran != (search, settings):
            begun = time.process_time()
            found, ran = search_class(search)(**settings).run(space, Budget(nfe=nfe)), (search, settings)
            seconds = (time.process_time() - begun) / space.num_prompts
        rows = {}
        for target, (label, each) in enumerate(zip(space.ids, found, strict=True)):
            index = drawn(each, how, judge.count, space.seed)
            cost = {"seconds": seconds, "evaluations": each.ledger.denoiser_evaluations, "found": len(each)}
            if index is None:
                rows[label] = cost
                continue
            rows[label] = {**judge(each.results[index], target), "distinct": len(index.unique()), **cost}
            if label == SHOWN and space.seed == 0:
                shown = each.results[index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]]
                save_file({"images": shown[:COLUMNS].contiguous()}, out / f"shown-{nfe}-{len(results)}.safetensors")
                rows[label]["shown"] = f"shown-{nfe}-{len(results)}.safetensors"
        results[key] = rows
        (out / "results.json").write_text(json.dumps(results, indent=1))
        distances = {group: average(rows, labels, "distance") for group, labels in GROUPS.items()}
        print(f"seed {space.seed}, {nfe} evaluations, {name}: {distances}, {seconds:.1f} s a target", flush=True)


def average(rows, labels, figure):
    """Mean of a figure over the targets that have it; None where none has."""
    values = [rows[label][figure] for label in labels if figure in rows.get(label, {})]
    return sum(values) / len(values) if values else None


def over_seeds(results, nfe, name, labels, figure):
    """(mean, standard error over seeds or None) of a figure's mean over targets; None where there is none."""
    found = [rows for key, rows in results.items() if key.split("/", 1)[1] == f"{nfe}/{name}"]
    values = [value for rows in found if (value := average(rows, labels, figure)) is not None]
    if not values:
        return None
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def cell(value, places=2):
    """A figure with its standard error."""
    if value is None:
        return ""
    mean, error = value
    return f"{mean:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def table(results, group, budgets):
    """Markdown: distances at every budget, the other figures at the largest, and the paper's FID."""
    labels, last = GROUPS[group], max(budgets)
    heads = [f"distance, {nfe:,}" for nfe in budgets]
    heads += ["judge", "reward", "diversity", "distinct", "seconds", "the paper's FID"]
    lines = [f"| {group} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in ["exact draws", *METHODS]:
        cells = [cell(over_seeds(results, nfe, name, labels, "distance")) for nfe in budgets]
        for figure, places in (("judge", 3), ("reward", 3), ("diversity", 3), ("distinct", 0), ("seconds", 1)):
            value = over_seeds(results, last, name, labels, figure)
            cells.append(cell((value[0], None) if value and figure in ("distinct", "seconds") else value, places))
        cells.append(f"{PAPER[name][list(GROUPS).index(group)]:.3f}" if name in PAPER else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(results, group, nfe):
    """One sentence: the order of the methods, and which of the baselines beat the trees."""
    found = {name: over_seeds(results, nfe, name, GROUPS[group], "distance") for name in METHODS}
    means = {name: value[0] for name, value in found.items() if value is not None}
    order = sorted(means, key=means.__getitem__)
    trees = [name for name in order if name.startswith("tree")]
    told = [
        f"{name} beats {', '.join(behind) if len(behind) < len(trees) else 'every tree'}"
        for name in ("rejection", "importance")
        if name in means and (behind := [tree for tree in trees if means[name] < means[tree]])
    ] or ["the trees beat both"]
    runs = [rows for key, rows in results.items() if key.endswith(f"/{nfe}/rejection")]
    empty = [label for rows in runs for label in GROUPS[group] if "distance" not in rows.get(label, {})]
    if empty:
        total = len(runs) * len(GROUPS[group])
        told.append(f"rejection kept nothing in {len(empty)} of {total} runs, which are left out of its mean")
    return f"- {group}, {nfe:,} evaluations: {' < '.join(order)}; {'; '.join(told)}."


def picture(results, nfe, out):
    """Draws of one digit, a row for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {"exact draws": "shown-exact.safetensors"}
    rows |= {name: results[f"0/{nfe}/{name}"][SHOWN].get("shown") for name in METHODS if f"0/{nfe}/{name}" in results}
    rows = {name: load_file(out / file)["images"] for name, file in rows.items() if file}
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.4, 0.5 * len(rows)), layout="constrained", squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(torch.cat(list(images[:, 0]), 1).clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(out / "samples.png", dpi=130, bbox_inches="tight")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=60_000, help="samples of the prior that give the exact draws")
    parser.add_argument("--train-steps", type=int, default=7000)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.enable_grad():
        denoiser, classifier, network = models(args.data, args.out, args.train_steps)
    pool = pool_of(denoiser, classifier, args.pool, args.out / "pool.safetensors")
    space = MNIST(denoiser, classifier)
    judge = Judge(network, pool, space, args.draws)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    exact = {label: judge(judge.exact[i], i) | {"distinct": args.draws} for i, label in enumerate(space.ids)}
    results |= {f"0/{nfe}/exact draws": exact for nfe in args.nfe}
    shown = judge.exact[space.ids.index(SHOWN)][:COLUMNS]
    save_file({"images": shown.contiguous()}, args.out / "shown-exact.safetensors")
    for nfe in args.nfe:
        for seed in range(args.seeds):
            measure(MNIST(denoiser, classifier, seed=seed), judge, nfe, results, args.out)
    text = "\n\n".join(table(results, group, args.nfe) for group in GROUPS)
    text += "\n\n" + "\n".join(verdict(results, group, nfe) for group in GROUPS for nfe in args.nfe)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    picture(results, max(args.nfe), args.out)


if __name__ == "__main__":
    main()
