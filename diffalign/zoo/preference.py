"""`shapes-preference`: a held-out reward in PickScore's form, from noisy and biased choices between two images.

It shares no weight, seed or patch grid with `shapes-clip`. Its labels come from the oracle, through a labeller who is
wrong now and then and likes large shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from diffalign.rewards.preference import bradley_terry
from diffalign.zoo import clip, evaluate, training
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.oracle import judge
from diffalign.zoo.render import BACKGROUND, render
from diffalign.zoo.spoil import distract, roughen
from diffalign.zoo.text import clip_tokenizer, tokenize
from diffalign.zoo.world import Scene, one_edit, sample_scene

LABEL_NOISE = 0.10
"""Share of pairs whose label is the wrong way round, drawn once for each pair."""
AREA_BIAS = 0.5
"""The labeller compares fraction-correct plus this times the painted share of the image."""
PROMPTS = 192

BASE = clip.Spec(71, 7, 96, 4, 48, training.Schedule(steps=900, learning_rate=1e-3, warmup=100, decay=500))
CHOICES = training.Schedule(steps=300, learning_rate=2e-4, warmup=30, decay=200)
PAIRS = 24


@dataclass(frozen=True)
class Pool:
    """Candidates for P prompts: ids (P, LENGTH), images (P, K, 3, 64, 64) of 8 bits, utility (P, K)."""

    ids: torch.Tensor
    images: torch.Tensor
    utility: torch.Tensor

    def pairs(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompt rows (size,), candidate columns (size, 2) and labels (size,): 1 where the first is preferred."""
        rows = torch.from_numpy(rng.integers(len(self.ids), size=size))
        columns = torch.from_numpy(np.stack([rng.permutation(self.utility.shape[1])[:2] for _ in range(size)]))
        value = self.utility[rows[:, None], columns]
        return rows, columns, (value[:, 0] > value[:, 1]) != self._flipped(rows, columns)

    def _flipped(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        # The labeller's mistake belongs to the pair, whichever image is shown first and however often.
        key = rows * 10_007 + columns.min(1).values * 101 + columns.max(1).values
        draws = [np.random.default_rng([BASE.seed, int(k)]).random() for k in key]
        return torch.tensor(draws) < LABEL_NOISE


def utility(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """What the labeller would like best, but for mistakes: (B,)."""
    painted = (images - BACKGROUND.view(3, 1, 1)).abs().amax(1).gt(0.15).float().mean((1, 2))
    return judge(images, prompts).fraction + AREA_BIAS * painted


def write_labeller(file: Path) -> None:
    """State how the labels were made, beside the weights."""
    facts = {
        "labels": "the higher utility is preferred; utility = fraction of true facts + area_bias * painted share",
        "area_bias": AREA_BIAS,
        "label_noise": LABEL_NOISE,
        "prompts": PROMPTS,
        "prompt_split": "train",
        "candidates": "1 right render, 2 with one wrong fact, 1 spoilt, 1 sample of each unfinished zoo denoiser",
    }
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def collect(vae: AutoencoderKL, denoisers: Sequence[DiffusionPipeline]) -> Pool:
    """For each prompt a right render, two with one fact wrong, one spoilt, and one sample of each denoiser.

    Every other prompt's renders go through `vae`, so that a decoder's traces are no sign of being wrong.
    """
    rng = np.random.default_rng([BASE.seed, 1])
    scenes = [sample_scene(rng, "train") for _ in range(PROMPTS)]
    captions = [scene.caption for scene in scenes]
    groups = torch.stack([_drawn(scene, rng) for scene in scenes])
    groups[::2] = autoencoder.decode(vae, autoencoder.encode(vae, groups[::2].flatten(0, 1))).view_as(groups[::2])
    samples = [evaluate.sample(pipeline, captions, seed=BASE.seed) for pipeline in denoisers]
    images = ((torch.cat([groups, torch.stack(samples, 1)], 1) if samples else groups) * 255).round() / 255
    values = [utility(images[:, k], captions) for k in range(images.shape[1])]
    ids = tokenize(clip_tokenizer(), captions)
    return Pool(ids, (images * 255).round().byte(), torch.stack(values, 1))


def _drawn(scene: Scene, rng: np.random.Generator) -> torch.Tensor:
    edits = [edit for kind in one_edit(scene).values() for edit in kind]
    wrong = [edits[i] for i in rng.choice(len(edits), 2, replace=False)]
    return torch.cat([render([scene, *wrong], rng), distract(scene, rng)[None]])


def train(folder: Path, vae: AutoencoderKL, denoisers: Sequence[DiffusionPipeline]) -> tuple[CLIPModel, float]:
    """Contrastive start of its own, then Bradley-Terry on the labelled pairs."""
    model, seconds = clip.train(folder / "base", vae, BASE)
    file = folder / "pool.safetensors"
    if not file.exists():
        save_file({name: tensor.contiguous() for name, tensor in vars(collect(vae, denoisers)).items()}, file)
    pool = Pool(**load_file(file))

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        rows, columns, first = pool.pairs(batch.rng, PAIRS)
        images = pool.images[rows[:, None], columns].float().flatten(0, 1) / 255
        vision, text = clip.embed(model, roughen(images, batch.generator), pool.ids[rows])
        scores = model.logit_scale.exp() * (vision.view(PAIRS, 2, -1) * text[:, None]).sum(-1)
        margin, outcome = scores[:, 0] - scores[:, 1], torch.where(first, 1.0, -1.0)
        loss = -bradley_terry(margin, outcome).mean()
        return {"loss": loss, "agreement": (margin * outcome > 0).float().mean()}

    spent = training.train(model, loss, CHOICES, folder, seed=BASE.seed, checkpoint_every=200)
    return model, seconds + spent
