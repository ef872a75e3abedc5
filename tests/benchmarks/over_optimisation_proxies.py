"""Proxies of the over-optimisation benchmark: zoo rewards, an ensemble of small heads, and combinations of its members.

Every image is looked at once, in part files: its embedding, the zoo rewards' scores, and the oracle's verdict. The
heads read the embeddings; the combinations are the toolkit's own, on the heads' scores.
"""

import os

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffalign.rewards import Reward, load
from diffalign.rewards.encoders import shared_features
from diffalign.rewards.ensembles import Mean, UncertaintyWeighted, WorstCase
from diffalign.rewards.preference import Pairs, PreferenceReward, fit_preference, write_reward
from diffalign.rewards.references import PAR, LogSigmoid, reference_rewards
from diffalign.rewards.statistics import StandardisedSum, measure
from diffalign.zoo.oracle import judge
from tests.benchmarks.over_optimisation_images import plan

ZOO = ("shapes-clip", "shapes-preference")
MEMBERS, PAIRS, NOISE, HIDDEN = 5, 300, 0.25, 32
"""Each head learns from its own bootstrap of the same 300 pairs; a quarter of their labels are the wrong way round."""
PENALTY = 0.5
"""Lambda of UWO, on members of standard deviation one: the default of Coste et al.'s best-of-n scripts."""
QUANTILE = 0.85
"""Of the references, the thresholds of the log-sigmoid conjunction: that of Wang et al."""


def look(out, split, captions, samples):
    """Facts of every image that is drawn, name -> (P, N, ...); N is the most samples that all prompts have."""
    rewards = [load(name) for name in ZOO]
    parts = []
    for name, rows in plan(split, captions, samples):
        images, facts = out / "images" / name, out / "facts" / name
        if not facts.exists():
            if not images.exists():
                continue
            facts.parent.mkdir(exist_ok=True)
            found = look_at(rewards, load_file(images)["images"].float() / 255, [captions[p] for p, _ in rows])
            save_file(found | {"rows": torch.tensor(rows)}, f"{facts}.new")
            os.replace(f"{facts}.new", facts)
        parts.append(load_file(facts))
    facts = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    rows = facts.pop("rows")
    order = [rows[:, 0].eq(p).nonzero().flatten() for p in range(len(captions))]
    count = min(len(found) for found in order)
    index = torch.stack([found[rows[found, 1].argsort()][:count] for found in order])
    return {key: value[index] for key, value in facts.items()}


@torch.no_grad()
def look_at(rewards, images, prompts):
    verdicts = judge(images, prompts)
    with shared_features():
        scores = {reward.name: reward(images, prompts).value for reward in rewards}
        embeddings = rewards[0].encoder.image_features(images)
    return scores | {
        "embedding": embeddings,
        "all_correct": verdicts.all_correct.float(),
        "fraction": verdicts.fraction,
    }


def labelled_pairs(facts, captions, encoder):
    """The pairs that a noisy labeller decided: images of one prompt, the one with more true facts is preferred."""
    rng = np.random.default_rng(0)
    fraction, embedding = facts["fraction"], facts["embedding"]
    every = [(p, i, j) for p in range(len(captions)) for i in range(fraction.shape[1]) for j in range(i)]
    decided = [(p, i, j) for p, i, j in every if fraction[p, i] != fraction[p, j]]
    chosen = [decided[k] for k in rng.choice(len(decided), PAIRS, replace=False)]
    p, i, j = (torch.tensor(column) for column in zip(*chosen, strict=True))
    outcome = torch.where(fraction[p, i] > fraction[p, j], 1, -1)
    outcome = torch.where(torch.from_numpy(rng.random(PAIRS) < NOISE), -outcome, outcome)
    text = encoder.text_features(captions)
    return Pairs(embedding[p, i], embedding[p, j], text[p], outcome, tuple(captions[k] for k in p.tolist()))


def train_members(out, facts, captions):
    """(rewards, their figures): five heads, each of its own bootstrap, seed and split. Written as recipes."""
    encoder, rewards, figures = load(ZOO[0]).encoder, [], {}
    pairs = labelled_pairs(facts, captions, encoder)
    for k in range(MEMBERS):
        rows = torch.randint(len(pairs), (len(pairs),), generator=torch.Generator().manual_seed(100 + k))
        fitted = fit_preference(pairs.take(rows), hidden=HIDDEN, seed=k)
        name = f"member-{k + 1}"
        write_reward(
            out / "heads", name, fitted, path="zoo:shapes-clip", licence="Apache-2.0", source="noisy oracle labels"
        )
        rewards.append(PreferenceReward(encoder, fitted.head, name=name))
        figures[name] = {"epoch": fitted.epoch, "validation": fitted.validation, "training": fitted.training}
    return rewards, figures


@torch.no_grad()
def add_members(facts, captions, members):
    """Facts with each member's scores (P, N)."""
    text = members[0].encoder.text_features(captions)
    count = facts["fraction"].shape[1]
    flat, texts = facts["embedding"].flatten(0, 1), text.repeat_interleave(count, 0)
    return facts | {member.name: member.head(flat, texts)[0].view(-1, count) for member in members}


class Stored(Reward):
    """Scores that were computed before: sample i of a batch is the row that its metadata names."""

    needs = ("row",)

    def __init__(self, name, column):
        self.name, self.column = name, column

    def values(self, images, prompts, metadata):
        return self.column[[m["row"] for m in metadata]]


def call(reward, rows, captions, count):
    """Score of the stored samples (prompt, sample), through the reward's own `__call__`."""
    prompts = [captions[r // count] for r in rows]
    return reward(torch.zeros(len(rows), 3, 1, 1), prompts, [{"row": r} for r in rows])


def proxies(facts, captions, training, references):
    """Proxy scores (P, N - R) by name; the first R samples of each prompt are references and are left out of all.

    Members are brought to mean 0 and standard deviation 1 on the training prompts' images, one scale for all prompts.
    Pairs never told what a member adds to all images of a prompt, and WCO compares it; PAR takes it out.
    """
    count = facts["fraction"].shape[1]
    names = [f"member-{k + 1}" for k in range(MEMBERS)]
    stored = [Stored(name, facts[name].flatten()) for name in names]
    scale = {}
    for name in names:
        column = training[name].flatten()
        scale |= measure([call(Stored(name, column), range(len(column)), ["-"] * len(column), 1)])
    standard = [StandardisedSum([(reward, 1.0)], scale) for reward in stored]
    known = [p * count + s for p in range(len(captions)) for s in range(references)]
    told = [captions[r // count] for r in known]
    given = [reference_rewards(told, call(reward, known, captions, count)) for reward in stored]
    usual = [reference_rewards(told, call(reward, known, captions, count)) for reward in standard]
    tau = [{prompt: float(np.quantile(r, QUANTILE)) for prompt, r in each.items()} for each in usual]
    terms = [(reward, 1.0) for reward in standard]
    against = [PAR(reward, r) for reward, r in zip(stored, given, strict=True)]
    ways = {
        "mean": Mean(standard),
        "WCO": WorstCase(standard),
        "UWO": UncertaintyWeighted(standard, PENALTY),
        "log-sigmoid": LogSigmoid(terms, {reward.name: t for reward, t in zip(standard, tau, strict=True)}),
        "PAR": Mean(against),
        "WCO of PAR": WorstCase(against),
    }
    ways |= {name: Stored(name, facts[name].flatten()) for name in ZOO}
    ways |= dict(zip(names, standard, strict=True))
    rest = [p * count + s for p in range(len(captions)) for s in range(references, count)]
    return {name: call(way, rest, captions, count).value.view(len(captions), -1) for name, way in ways.items()}
