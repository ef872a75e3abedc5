"""Encoded train scenes, kept in memory: what both denoisers learn from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from diffalign.zoo import vae as autoencoder
from diffalign.zoo.render import render
from diffalign.zoo.text import tokenize
from diffalign.zoo.training import Batch
from diffalign.zoo.world import mirrored, sample_scene

COUNT = 16_384
DROPOUT = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""


@dataclass(frozen=True)
class Latents:
    """Unscaled latents (N, 4, 16, 16) in half precision and token ids (N, V, LENGTH) of V ways to say each scene."""

    latents: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor

    def draw(self, batch: Batch, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`size` random unscaled latents in single precision and their captions' ids, some of them empty."""
        rows = torch.randint(len(self.latents), (size,), generator=batch.generator)
        way = torch.randint(self.ids.shape[1], (size,), generator=batch.generator)
        drop = torch.rand(size, generator=batch.generator) < DROPOUT
        ids = torch.where(drop[:, None], self.empty, self.ids[rows, way])
        return self.latents[rows].float(), ids


def collect(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, count: int = COUNT) -> Latents:
    """Render and encode `count` scenes of the train split; a pair is said from either object's side."""
    chunks, captions = [], []
    for start in range(0, count, 256):
        rng = np.random.default_rng([seed, start])
        scenes = [sample_scene(rng, "train") for _ in range(min(256, count - start))]
        chunks.append(autoencoder.encode(vae, render(scenes, rng)).half())
        for scene in scenes:
            captions += [scene.caption, (mirrored(scene) if scene.relation else scene).caption]
    ids = tokenize(tokenizer, [*captions, ""])
    return Latents(torch.cat(chunks).contiguous(), ids[:-1].view(count, 2, -1).clone(), ids[-1].clone())


def cached(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, file: Path) -> Latents:
    """`collect`, or what an earlier call left in `file`."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(vars(collect(vae, tokenizer, seed)), file)
    return Latents(**load_file(file))
