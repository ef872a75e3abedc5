"""`shapes-noisy-reward`: a reward on noisy latents of `shapes-sd3`, of two objectives that pull apart.

`preference` is what the labeller of `shapes-preference` would choose, mistakes included; `warmth` is red over blue in
the whole picture, whatever the prompt says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.engine.checkpoint import load_checkpoint, save_checkpoint
from diffalign.engine.tracking import Metrics
from diffalign.finetune.noisy_reward import NoisyRewardTrainer
from diffalign.laws import default_law
from diffalign.policies import Policy
from diffalign.report import compare
from diffalign.rewards import noisy
from diffalign.rollout import rollout
from diffalign.zoo.preference import LABEL_NOISE, utility
from diffalign.zoo.world import Scene, Split, one_edit, sample_scene

SEED = 91
OBJECTIVES = ("preference", "warmth")
MIX = {"preference": 1.0, "warmth": 0.0}
BLOCKS = 3  # of six
TIES = 0.2
TRAINING = {
    "num_prompts_per_step": 12,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "adam_beta2": 0.99,
    "max_train_steps": 400,
}
PROMPTS: dict[Split, int] = {"train": 800, "test": 128}
STEPS = 10
GUIDANCE = (3.0, 1.0)
"""Of each caption in turn: well drawn, and poorly."""
WRONG = 2
"""Captions with one wrong fact that are drawn for each scene beside its own."""
CHUNK = 16


def collect(policy: Policy, split: Split, folder: Path) -> dict[str, Tensor]:
    """Samples for scenes of a split, and what both objectives say of them; resumes after the last whole chunk.

    For each scene its own caption and `WRONG` captions with one wrong fact, at each of `GUIDANCE`: G samples.

    Returns:
        latents (P, G, 4, 16, 16) in half precision, and values (P, G, 2) in the order of `OBJECTIVES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = scenes(split)
    chunks = []
    for start in range(0, len(everything), CHUNK):
        file = folder / f"{split}-{start:06d}.safetensors"
        if not file.exists():
            save_file(_draw(policy, everything[start : start + CHUNK], start, split), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        chunks.append(load_file(file))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in ("latents", "values")}


def scenes(split: Split) -> list[Scene]:
    """The scenes that are drawn, always the same."""
    rng = np.random.default_rng([SEED, split == "test"])
    return [sample_scene(rng, split) for _ in range(PROMPTS[split])]


def _draw(policy: Policy, chunk: Sequence[Scene], first: int, split: Split) -> dict[str, Tensor]:
    """The samples of some scenes, the first of which has the number `first`."""
    schedule = policy.schedule(STEPS)
    law = default_law(schedule.kind)
    captions = [caption for i, scene in enumerate(chunk, first) for caption in _captions(scene, i, split)]
    latents = []
    for k, scale in enumerate(GUIDANCE):
        rows = [(split, first + i // (1 + WRONG), i % (1 + WRONG), k) for i in range(len(captions))]
        condition = policy.encode(captions)
        taken = rollout(policy, condition, law, schedule, rows=rows, seed=SEED, guidance_scale=scale)
        latents.append(taken.latents.unflatten(0, (len(chunk), -1)))
    found = torch.cat(latents, 1).half()
    group = found.shape[1]
    with torch.no_grad():
        images = policy.decode(found.flatten(0, 1).float(), micro_batch_size=32)
    images = (images * 255).round() / 255
    prompts = [scene.caption for scene in chunk for _ in range(group)]
    values = torch.stack([utility(images, prompts), warmth(images)], 1)
    return {"latents": found.contiguous(), "values": values.unflatten(0, (len(chunk), group)).contiguous()}


def _captions(scene: Scene, number: int, split: Split) -> list[str]:
    rng = np.random.default_rng([SEED, split == "test", number])
    edits = [edit for kind in one_edit(scene).values() for edit in kind]
    return [scene.caption, *(edits[i].caption for i in rng.choice(len(edits), WRONG, replace=False))]


def warmth(images: Tensor) -> Tensor:
    """Red less blue, mean over the pixels of images (B, 3, H, W) in [0, 1]: (B,)."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def choices(drawn: dict[str, Tensor], split: Split, margins: Tensor, *, mistakes: bool) -> noisy.Choices:
    """The choices in every pair of the samples of a scene.

    Args:
        drawn: what `collect` returned.
        split: of the scenes.
        margins: (2,) below which a difference is a tie.
        mistakes: whether the labeller is wrong now and then, in `LABEL_NOISE` of the pairs; warmth never is.
    """
    prompts = [scene.caption for scene in scenes(split)][: len(drawn["latents"])]
    found = noisy.Choices.from_values(drawn["latents"], drawn["values"], prompts, margins)
    if not mistakes:
        return found
    rng = np.random.default_rng([SEED, split == "test", 1])
    wrong = torch.from_numpy(rng.random(found.outcome.shape[:2]) < LABEL_NOISE)
    outcome = found.outcome.clone()
    outcome[..., 0] = torch.where(wrong, -outcome[..., 0], outcome[..., 0])
    return noisy.Choices(found.latents, outcome, found.prompts)


def train(policy: Policy, learned: noisy.Choices, folder: Path, levels: str) -> tuple[noisy.NoisyReward, float]:
    """The reward, trained at the noise levels of the pipeline ("schedule") or on clean latents alone ("clean").

    Resumes from its newest checkpoint in `folder`. Returns the reward and the seconds, over all resumes.
    """
    reward = noisy.NoisyReward(policy, MIX, blocks=BLOCKS, seed=SEED)
    trainer = NoisyRewardTrainer(reward, learned, levels=levels, seed=SEED, **TRAINING)
    found = load_checkpoint(folder)
    if found is not None:
        trainer.load_state_dict(found[1]["trainer"])
    before, clock = found[1]["seconds"] if found is not None else 0.0, time.monotonic()
    last = trainer.training.max_train_steps
    metrics = Metrics(folder, resume_step=trainer.step)
    for row in trainer.iterate(trainer.prompts, last):
        metrics.append(row)
        if trainer.step % 25 == 0 or trainer.step == last:
            spent = before + time.monotonic() - clock
            save_checkpoint(folder, trainer.step, {"trainer": trainer.state_dict(), "seconds": spent}, total_limit=1)
    metrics.close()
    return reward, before + time.monotonic() - clock


def figures(aware: noisy.NoisyReward, clean: noisy.NoisyReward, held: noisy.Choices) -> dict[str, Any]:
    """Share of the decided pairs ranked right, mean over scenes, by noise level: the two rewards, and their difference.

    The reward that was trained on clean latents is measured twice: told the level, which it never saw, and told that
    there is no noise.
    """
    ways = {
        "noise-aware": (aware, None),
        "clean-trained": (clean, None),
        "clean-trained, told that t = 0": (clean, 0.0),
    }
    table: dict[str, Any] = {name: {way: {} for way in (*ways, "gain over clean-trained")} for name in OBJECTIVES}
    for sigma in noisy.SIGMAS:
        counts = {way: noisy.ranked_right(reward, held, sigma, told=told) for way, (reward, told) in ways.items()}
        for k, name in enumerate(OBJECTIVES):
            share = {way: (right[:, k] / decided[:, k]).numpy() for way, (right, decided) in counts.items()}
            for way, values in share.items():
                table[name][way][f"{sigma:g}"] = round(float(np.nanmean(values)), 4)
            base = share["clean-trained"]
            found = compare(name, "heldout", base, share["noise-aware"], range(len(base)))
            told = f"{found.difference:+.3f}, 95 % {found.low:+.3f} to {found.high:+.3f}"
            table[name]["gain over clean-trained"][f"{sigma:g}"] = told
    decided = (held.outcome.abs() == 1).sum((0, 1)).tolist()
    return table | {"scenes": len(held), "decided_pairs": dict(zip(OBJECTIVES, decided, strict=True))}


def build(policy: Policy, work: Path) -> tuple[noisy.NoisyReward, dict[str, Any], float]:
    """Draw, train and measure both rewards; returns the noise-aware one, figures and its seconds."""
    policy.set_max_sequence_length(16)  # the silent T5 may be short (see `sd3`)
    drawn = {split: collect(policy, split, work / "samples") for split in PROMPTS}
    margins = noisy.tie_margins(drawn["train"]["values"], TIES)
    learned = choices(drawn["train"], "train", margins, mistakes=True)
    aware, seconds = train(policy, learned, work / "noise-aware", "schedule")
    clean, _ = train(policy, learned, work / "clean", "clean")
    return aware, figures(aware, clean, choices(drawn["test"], "test", margins, mistakes=False)), seconds
