"""Figures of the autoencoder and of the learned rewards, on scenes of the test split."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from diffalign.zoo import clip
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.oracle import judge
from diffalign.zoo.render import render
from diffalign.zoo.spoil import distract
from diffalign.zoo.text import clip_tokenizer, tokenize
from diffalign.zoo.world import Scene, Thing, one_edit, sample_scene

SEED = 81


def reconstruction(vae: AutoencoderKL, count: int = 256) -> dict[str, float]:
    """PSNR in dB, and how often the oracle still finds the caption true."""
    rng = np.random.default_rng([SEED, 0])
    scenes = [sample_scene(rng, "test") for _ in range(count)]
    images = render(scenes, rng)
    decoded = autoencoder.decode(vae, autoencoder.encode(vae, images))
    mse = (decoded - images).square().mean()
    correct = judge(decoded, [scene.caption for scene in scenes]).all_correct.float().mean()
    return {"psnr": round(float(-10 * mse.log10()), 2), "oracle_all_correct": round(float(correct), 4), "images": count}


@torch.no_grad()
def similarity(model: CLIPModel, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Cosines (N, N) of every image (N, 3, 64, 64) with every caption."""
    ids = tokenize(clip_tokenizer(), captions)
    chunks = [clip.embed(model, chunk, ids) for chunk in torch.split(images, 256)]
    return torch.cat([vision @ text.T for vision, text in chunks])


def retrieval(model: CLIPModel, count: int = 128) -> dict[str, dict[str, float]]:
    """How often the right one scores higher, by the fact that the wrong one gets wrong.

    `caption`: an image with its caption and with a caption of one wrong fact. `image`: a caption with its image and
    with an image of one wrong fact, or a spoilt one (`spoilt`). `recall_at_1`: of `count` captions, of `count` images.
    """
    rng = np.random.default_rng([SEED, 1])
    scenes = [sample_scene(rng, "test", objects=2) for _ in range(count)]
    images = render(scenes, rng)
    captions = [scene.caption for scene in scenes]
    grid = similarity(model, images, captions)
    right, best = grid.diagonal(), torch.arange(count)
    figures: dict[str, dict[str, float]] = {"caption": {}, "image": {}}
    for kind, (rows, wrong) in _wrong_scenes(scenes, rng).items():
        told = similarity_rows(model, images[rows], [scene.caption for scene in wrong])
        shown = similarity_rows(model, render(wrong, rng), [captions[row] for row in rows])
        figures["caption"][kind] = round(float((right[rows] > told).float().mean()), 4)
        figures["image"][kind] = round(float((right[rows] > shown).float().mean()), 4)
    spoilt = similarity_rows(model, torch.stack([distract(scene, rng) for scene in scenes]), captions)
    figures["image"]["spoilt"] = round(float((right > spoilt).float().mean()), 4)
    figures["recall_at_1"] = {
        "caption": round(float((grid.argmax(1) == best).float().mean()), 4),
        "image": round(float((grid.argmax(0) == best).float().mean()), 4),
        "of": count,
    }
    return figures


def _wrong_scenes(scenes: Sequence[Scene], rng: np.random.Generator) -> dict[str, tuple[list[int], list[Scene]]]:
    """Two wrong neighbours of each kind for each scene, with the scene's row."""
    wrong: dict[str, tuple[list[int], list[Scene]]] = defaultdict(lambda: ([], []))
    for row, scene in enumerate(scenes):
        for kind, edits in one_edit(scene).items():
            for i in rng.choice(len(edits), min(2, len(edits)), replace=False):
                wrong[kind][0].append(row)
                wrong[kind][1].append(edits[i])
    return dict(wrong)


@torch.no_grad()
def similarity_rows(model: CLIPModel, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """Cosines (N,) of image i with caption i."""
    ids = tokenize(clip_tokenizer(), captions)
    vision, text = clip.embed(model, images, ids)
    return (vision * text).sum(-1)


def preferences(model: CLIPModel, count: int = 256) -> dict[str, float]:
    """How often the better of two renders scores higher: by all facts, and by the labeller's taste where facts tie.

    `against_oracle`: a right render against one with one wrong fact or a spoilt one. `larger`: of two right renders of
    one caption without sizes, the larger.
    """
    rng = np.random.default_rng([SEED, 2])
    scenes = [sample_scene(rng, "test") for _ in range(count)]
    captions = [scene.caption for scene in scenes]
    right = similarity_rows(model, render(scenes, rng), captions)
    figures = {}
    wrong = [_any_edit(scene, rng) for scene in scenes]
    figures["one_wrong_fact"] = right > similarity_rows(model, render(wrong, rng), captions)
    figures["spoilt"] = right > similarity_rows(model, torch.stack([distract(s, rng) for s in scenes]), captions)
    figures["against_oracle"] = torch.cat([figures["one_wrong_fact"], figures["spoilt"]])
    plain = [Scene(tuple(Thing(t.color, t.shape) for t in scene.things), scene.relation) for scene in scenes]
    sized = [
        [Scene(tuple(Thing(t.color, t.shape, size) for t in s.things), s.relation) for s in plain]
        for size in ("large", "small")
    ]
    large, small = (similarity_rows(model, render(s, rng), [p.caption for p in plain]) for s in sized)
    figures["larger"] = large > small
    return {name: round(float(holds.float().mean()), 4) for name, holds in figures.items()} | {"pairs": count}


def _any_edit(scene: Scene, rng: np.random.Generator) -> Scene:
    # A size that the caption does not say cannot be wrong.
    edits = [e for kind, group in one_edit(scene).items() for e in group if kind != "size" or _says_size(scene, e)]
    return edits[rng.integers(len(edits))]


def _says_size(scene: Scene, edit: Scene) -> bool:
    changed = [a for a, b in zip(scene.things, edit.things, strict=True) if a != b]
    return changed[0].size != "medium"
