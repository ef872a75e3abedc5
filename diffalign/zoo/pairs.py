"""Noise and what a teacher makes of it: what `shapes-turbo` learns from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from diffalign.zoo.sd3 import T5_LENGTHS, Denoiser
from diffalign.zoo.text import tokenize
from diffalign.zoo.training import Batch
from diffalign.zoo.world import sample_scene, say

SEED = 82
COUNT = 3072
CHUNK = 64
STEPS = 8
GUIDANCE = 3.0


@dataclass(frozen=True)
class Pairs:
    """Noise and where the teacher's flow leads it (N, 4, 16, 16), in half precision, and captions' ids (N, LENGTH)."""

    noise: torch.Tensor
    clean: torch.Tensor
    ids: torch.Tensor

    def draw(self, batch: Batch, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`size` random pairs in single precision, and their ids."""
        rows = torch.randint(len(self.ids), (size,), generator=batch.generator)
        return self.noise[rows].float(), self.clean[rows].float(), self.ids[rows]


@torch.no_grad()
def solve(teacher: Denoiser, noise: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, 4, 16, 16): Euler steps of the teacher's flow from `noise`, at even sigmas, with guidance."""
    count = len(ids)
    empty = tokenize(teacher.tokenizer, [""]).expand(count, -1)
    context, pooled = teacher.encode(torch.cat((ids, empty)))
    teacher.attention.copies = torch.full((2 * count,), float(T5_LENGTHS[0]))
    x = noise
    for step in range(STEPS):
        timestep = torch.full((2 * count,), 1000 * (1 - step / STEPS))
        prediction = teacher.transformer(x.repeat(2, 1, 1, 1), context, pooled, timestep).sample
        prompt, nothing = prediction.chunk(2)
        x = x - (nothing + GUIDANCE * (prompt - nothing)) / STEPS
    return x


def _chunk(teacher: Denoiser, start: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([SEED, start])
    ids = tokenize(teacher.tokenizer, [say(sample_scene(rng, "train"), rng) for _ in range(CHUNK)])
    noise = torch.randn(CHUNK, 4, 16, 16, generator=torch.Generator().manual_seed(SEED * 1_000_003 + start)).half()
    return {"noise": noise, "clean": solve(teacher, noise.float(), ids).half(), "ids": ids}


def cached(teacher: Denoiser, folder: Path, count: int = COUNT) -> Pairs:
    """`count` pairs on captions of the train split, in files of `folder`; only those that are missing are made."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.train()  # attends with weights, see `sd3`
    chunks = []
    for start in range(0, count, CHUNK):
        file = folder / f"{start:06d}.safetensors"
        if not file.exists():
            unfinished = file.with_suffix(".new")
            save_file(_chunk(teacher, start), unfinished)
            unfinished.rename(file)
        chunks.append(load_file(file))
    return Pairs(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in ("noise", "clean", "ids")})
