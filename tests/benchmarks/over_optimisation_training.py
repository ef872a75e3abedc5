"""Over-optimisation by training: reward backpropagation on a proxy of over_optimisation.py, the oracle beside it.

    python tests/benchmarks/over_optimisation_training.py [--out runs/over_optimisation] [--ways "one member" mean]

Needs the heads that over_optimisation.py writes. A finished way is not run again. Writes training-WAY.json for each
and training.png, of all that are finished, into `--out`. Prompts of training, of validation and of the heads' pairs
are three different sets.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign._compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

from diffalign.data import read_prompts  # noqa: E402
from diffalign.engine.evaluate import sample_images, score_images  # noqa: E402
from diffalign.finetune import RewardBackprop  # noqa: E402
from diffalign.policies import Policy  # noqa: E402
from diffalign.registry import data_root  # noqa: E402
from diffalign.rewards import Score, load  # noqa: E402
from diffalign.rewards.ensembles import Mean, UncertaintyWeighted, WorstCase  # noqa: E402
from diffalign.rewards.references import PAR, LogSigmoid, reference_rewards  # noqa: E402
from diffalign.rewards.statistics import StandardisedSum, measure  # noqa: E402
from diffalign.zoo.oracle_reward import ShapesOracle  # noqa: E402
from tests.benchmarks.over_optimisation_proxies import MEMBERS, PENALTY, QUANTILE  # noqa: E402

WAYS = ("one member", "mean", "WCO", "UWO", "log-sigmoid", "PAR")
SAMPLING = {"num_inference_steps": 10, "guidance_scale": 3.0}
STEPS, EVERY, EACH = 40, 5, 4
"""Gradient steps, how often the oracle looks, and reference images of each training prompt."""


def setting(out):
    """(policy, members, training prompts, validation prompts)."""
    policy = Policy.wrap(DiffusionPipeline.from_pretrained(data_root() / "zoo" / "shapes-sd"))
    members = [load(out / "heads" / f"member-{k + 1}.yaml") for k in range(MEMBERS)]
    taught = read_prompts("prompts:shapes-train")[64:128]
    return policy, members, taught, read_prompts("prompts:shapes-validation")


def build(way, members, policy, taught):
    """The proxy; scale, thresholds and references are of the untrained policy's images of the training prompts."""
    base = score_images(
        sample_images(policy, taught, num_images_per_prompt=EACH, seed=1, **SAMPLING), {r.name: r for r in members}
    )
    scores = {name: Score(v, v.isfinite(), {name: v}) for name, v in base.scores.items()}
    scale = {name: measure([score])[name] for name, score in scores.items()}
    standard = [StandardisedSum([(reward, 1.0)], scale) for reward in members]
    told = [prompt.text for prompt in base.prompts]
    given = [reference_rewards(told, scores[reward.name]) for reward in members]
    tau = {
        whole.name: {
            prompt: (float(np.quantile(r, QUANTILE)) - scale[reward.name].mean) / scale[reward.name].std
            for prompt, r in each.items()
        }
        for whole, reward, each in zip(standard, members, given, strict=True)
    }
    return {
        "one member": lambda: standard[0],
        "mean": lambda: Mean(standard),
        "WCO": lambda: WorstCase(standard),
        "UWO": lambda: UncertaintyWeighted(standard, PENALTY),
        "log-sigmoid": lambda: LogSigmoid([(reward, 1.0) for reward in standard], tau),
        "PAR": lambda: Mean([PAR(reward, each) for reward, each in zip(members, given, strict=True)]),
    }[way]()


def run(way, out):
    """Rows of training (proxy on the step's images) and of validation (members and oracle)."""
    clock = time.monotonic()
    torch.manual_seed(0)  # of the adapter's first weights
    policy, members, taught, held = setting(out)
    trainer = RewardBackprop(
        policy,
        build(way, members, policy, taught),
        gradient={"kind": "last_k", "k": 3},
        learning_rate=2e-3,
        lr_scheduler="constant",
        max_grad_norm=0.2,
        adam_beta2=0.99,
        num_prompts_per_step=16,
        max_train_steps=STEPS,
        seed=0,
        **SAMPLING,
    )
    judges = {reward.name: reward for reward in (*members, load("shapes-clip"), ShapesOracle())}
    rows, training = [], []
    for step in range(0, STEPS + 1, EVERY):
        if step:
            training += trainer.train(taught, steps=EVERY).rows
        scores = score_images(sample_images(policy, held, **SAMPLING), judges).scores
        each = {name: values.tolist() for name, values in scores.items()}
        rows.append({"step": step, "scores": each})
        oracle = scores["shapes-oracle"].mean()
        print(f"{way}: step {step}, oracle {oracle:.3f}, member-1 {scores['member-1'].mean():.3f}", flush=True)
    reward = [{"step": row["step"], "reward": row["reward"]} for row in training]
    return {"way": way, "seconds": time.monotonic() - clock, "validation": rows, "training": reward}


def band(rows, pick, since_start):
    """Mean of `pick(scores)` over prompts, or of its change since step 0, and its 95 % bootstrap interval."""
    values = np.array([pick({k: np.array(v) for k, v in row["scores"].items()}) for row in rows])
    values = values - since_start * values[0]
    weights = np.random.default_rng(0).multinomial(values.shape[1], [1 / values.shape[1]] * values.shape[1], size=2000)
    means = values @ weights.T / values.shape[1]
    return values.mean(1), *np.quantile(means, [0.025, 0.975], axis=1)


def draw(found, path):
    """Oracle, and the proxy's gain, against training steps, with intervals over prompts of the first two ways.

    The proxy is member 1, or the members' mean, in standard deviations of the untrained model's validation images.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for k, (way, result) in enumerate(found.items()):
        rows = result["validation"]
        first = {name: np.array(values) for name, values in rows[0]["scores"].items()}
        names = ["member-1"] if way == "one member" else [n for n in first if n.startswith("member-")]
        picks = {
            "oracle: all correct": lambda s: s["shapes-oracle"],
            "proxy: gain, standard deviations": lambda s, names=names, first=first: np.mean(
                [(s[n] - first[n].mean()) / first[n].std() for n in names], axis=0
            ),
        }
        for axis, (title, pick) in zip(axes, picks.items(), strict=True):
            mean, low, high = band(rows, pick, since_start=axis is axes[1])
            steps = [row["step"] for row in rows]
            axis.plot(steps, mean, color=f"C{k}", label=way)
            if k < 2:
                axis.fill_between(steps, low, high, color=f"C{k}", alpha=0.12, linewidth=0)
            axis.set(xlabel="training step", ylabel=title)
    axes[0].legend(fontsize=8)
    axes[0].set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/over_optimisation"))
    parser.add_argument("--ways", nargs="+", default=["one member", "mean"], choices=WAYS)
    args = parser.parse_args()
    files = {way: args.out / f"training-{way.replace(' ', '-')}.json" for way in WAYS}
    for way in args.ways:
        if not files[way].exists():
            files[way].write_text(json.dumps(run(way, args.out)))
        draw({w: json.loads(file.read_text()) for w, file in files.items() if file.exists()}, args.out / "training.png")


if __name__ == "__main__":
    main()
