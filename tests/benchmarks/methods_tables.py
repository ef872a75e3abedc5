"""What `tests.benchmarks.methods` measured, as tables.

Differences are paired over prompts, each the mean of its images and seeds: over the base on the same seeds, and in the
reward also over training on the best of n, on the seeds that both have.
"""

import numpy as np

JUDGES = {
    "shapes-clip": ("reward", 1, 3),
    "shapes-preference": ("held-out", 1, 2),
    "shapes-oracle": ("oracle, %", 100, 1),
}
COMPARED = (
    ("b2_diffurl", "ddpo"),
    ("b2_diffurl_long", "ddpo"),
    ("prdp", "ddpo"),
    ("b2_diffurl", "raft"),
    ("prdp", "raft"),
    ("ddpo", "raft"),
    ("dragon", "flow_sft_best_of_n"),
    ("flow_dpo", "flow_sft_best_of_n"),
    ("ddpo_long", "best of 8"),
    ("ddpo_long", "best of 4, guidance 2"),
    ("ddpo_long, best of 2", "best of 8"),
    ("ddpo_long, best of 2", "best of 4, guidance 2"),
)
SFT = {"shapes-sd": "sft_best_of_n", "shapes-sd3": "flow_sft_best_of_n"}


def of_prompts(files, judge):
    """(P,) mean scores of each prompt, over images and seeds."""
    return np.mean([np.mean(each["scores"][judge], axis=1) for each in files], axis=0)


def paired(values, others, scale, digits):
    """Mean difference over prompts with 1.96 standard errors; a star where 0 is outside."""
    difference = scale * (values - others)
    mean, half = difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return f"{mean:+.{digits}f} ± {half:.{digits}f}{' *' if abs(mean) > half else ''}"


def tables(files):
    """Print for each pipeline every method's figures, over those of the base with the same seeds."""
    for pipeline in dict.fromkeys(each["pipeline"] for each in files):
        groups = {}
        for each in files:
            if each["pipeline"] == pipeline:
                groups.setdefault(each["name"], []).append(each)
        heads = [head for head, *_ in JUDGES.values()]
        costs = ["reward calls", "evaluations", "minutes"]
        columns = [pipeline, "seeds", *heads, "reward over SFT", "diversity", "KL, nats", *costs]
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, found in sorted(groups.items(), key=lambda group: (rank(group[0]), group[0])):
            beside = groups[f"base of {pipeline}"], groups.get(SFT[pipeline], [])
            print(f"| {' | '.join([name, *row(found, *beside)])} |")

    differences(files)


def differences(files):
    """Print one method less another on the seeds that both have, in every judge and in diversity."""
    groups = {}
    for each in files:
        groups.setdefault(each["name"], {})[each["seed"]] = each
    heads = ["less", "seeds", *(head for head, *_ in JUDGES.values()), "diversity"]
    print(f"\n| {' | '.join(['', *heads])} |\n{'|---' * (len(heads) + 1)}|")
    for name, other in COMPARED:
        seeds = sorted(groups.get(name, {}).keys() & groups.get(other, {}).keys())
        if seeds:
            own, theirs = ([groups[key][seed] for seed in seeds] for key in (name, other))
            cells = [paired(of_prompts(own, j), of_prompts(theirs, j), s, d) for j, (_, s, d) in JUDGES.items()]
            spread = (np.mean([each["diversity"] for each in group], axis=0) for group in (own, theirs))
            print(f"| {' | '.join([name, other, str(len(seeds)), *cells, paired(*spread, 1, 4)])} |")


def rank(name):
    """The base, then searches, then methods."""
    return 0 if name.startswith("base of") else 1 if name.startswith(("best of", "flow: best of")) else 2


def row(found, base, tuned):
    """The cells of a method, beside the base and the training on the best of n."""
    seeds = {each["seed"] for each in found}
    same = [each for each in base if each["seed"] in seeds]
    cells = [str(len(seeds))]
    for judge, (_, scale, digits) in JUDGES.items():
        own = of_prompts(found, judge)
        told = "" if found is base else f" ({paired(own, of_prompts(same, judge), scale, digits)})"
        cells.append(f"{scale * own.mean():.{digits}f}{told}")
    cells.append("" if found is tuned or found is base else over(found, tuned))
    cells.append(f"{np.mean([np.mean(each['diversity']) for each in found]):.3f}")
    costs = [each["cost"] for each in found]
    cells.append(f"{np.mean([each['kl'] for each in found]):.1f}" if "kl" in found[0] else "")
    cells += [f"{np.mean([cost[key] for cost in costs]):,.0f}" for key in ("reward_calls", "nfe")]
    return [*cells, f"{np.mean([cost['seconds'] for cost in costs]) / 60:.1f}" if "seconds" in costs[0] else ""]


def over(found, rivals):
    """The difference in reward on the seeds that both have, which are counted where they are not all."""
    both = {each["seed"] for each in found} & {each["seed"] for each in rivals}
    if not both:
        return ""
    own, other = ([each for each in files if each["seed"] in both] for files in (found, rivals))
    counted = "" if len(both) == len(found) else f", of {len(both)}"
    return paired(of_prompts(own, "shapes-clip"), of_prompts(other, "shapes-clip"), 1, 3) + counted
