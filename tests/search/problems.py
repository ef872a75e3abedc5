"""Problems whose exact targets are known, as spaces to search.

The figures that methods are held to come with them: an independent measurement of the same problems, made before these
methods were written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffalign.laws import DDIM, Law, Schedule, diffusion_schedule
from diffalign.noise import Address
from diffalign.search.space import GaussianSpace, Path, Rows

STD, RADIUS, MODES = 0.3, 4.0, 8


def linear_betas(steps: int = 100) -> Schedule:
    """The DDPM schedule of the ring: betas from 0.001 to 0.07 in 100 steps."""
    betas = torch.linspace(0.001, 0.07, 100, dtype=torch.float64)
    timesteps = torch.linspace(99, 0, steps).round().long()
    return diffusion_schedule((1 - betas).cumprod(0), timesteps, None, 1.0)


@lru_cache(maxsize=1_000_000)
def _key(*address: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def hashed_uniform(addresses: Sequence[Address], steps: Tensor, size: int) -> Tensor:
    """Numbers in [0, 1) for all rows at once by a counter-based hash (SplitMix64), (B, size), for speed."""
    keys = np.array([_key(*address) for address in addresses], dtype=np.uint64)[:, None]
    counter = np.arange(1, size + 1, dtype=np.uint64) + np.uint64(size) * steps.numpy().astype(np.uint64)[:, None]
    z = keys + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53)


class Toy(GaussianSpace):
    """A space without network, whose noise is addressed as elsewhere and made for all rows at once."""

    def noise(self, purpose: str, prompts: Tensor, paths: Sequence[Path], steps: Tensor) -> Tensor:
        """Standard normal noise by Box-Muller."""
        addresses = [(self.seed, purpose, self.ids[p], *path) for p, path in zip(prompts.tolist(), paths, strict=True)]
        first, second = hashed_uniform(addresses, steps, 2 * math.prod(self.shape)).chunk(2, 1)
        normal = (-2 * torch.log1p(-first)).sqrt() * (2 * math.pi * second).cos()
        return normal.reshape(-1, *self.shape)


class Ring(Toy):
    """Rings of 8 Gaussians in m planes, with a reward that weighs the modes by exp(1.5 i); the target is exact.

    The reward is the sum over planes of log sum_i w_i N_i(x) - log sum_i N_i(x) - log w_8, so exp(r) is a class
    posterior, and the target p exp(r) is the same mixture with weights w_i / sum w in every plane.

    `detail` adds A sum_planes (mean cos(k x) - 1), which tells of fine structure that a predicted mean does not have.
    """

    def __init__(
        self,
        planes: int = 1,
        seeds: Sequence[int] = (0,),
        steps: int = 100,
        law: Law | None = None,
        spread: float = 1.5,
        detail: float = 0.0,
        modes: bool = True,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            law or DDIM(1.0),
            linear_betas(steps),
            (planes, 2),
            "sample",
            ids=list(seeds),
            dtype=torch.float64,
            micro_batch_size=micro_batch_size,
        )
        self.planes, self.detail, self.modes = planes, detail, modes
        angles = torch.arange(MODES, dtype=torch.float64) * 2 * math.pi / MODES
        self.centres = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
        self.log_w = spread * torch.arange(1, MODES + 1, dtype=torch.float64)
        self.target = self.log_w.softmax(0)
        self.log_z = planes * float(self.log_w.logsumexp(0) - math.log(MODES) - self.log_w[-1])

    def posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(mode | x), (..., 8)."""
        variance = alpha**2 * STD**2 + sigma**2
        square = (x[..., None, :] - alpha[..., None] * self.centres).square().sum(-1)
        return (-0.5 * square / variance).log_softmax(-1)

    def evaluate(self, rows: Rows) -> Tensor:
        """The exact posterior mean of x_0."""
        level = self.schedule.level(rows.steps)
        alpha, sigma = level.alpha[:, None, None], level.sigma[:, None, None]
        variance = alpha**2 * STD**2 + sigma**2
        centre = self.posterior(rows.x, alpha, sigma).exp() @ self.centres
        return centre + alpha * STD**2 / variance * (rows.x - alpha * centre)

    def reward(self, x: Tensor) -> Tensor:
        """r (B,)."""
        one, zero = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, 1, dtype=x.dtype)
        value = (self.posterior(x, one, zero) + self.log_w).logsumexp(-1) - self.log_w[-1]
        fine = self.detail * ((12 * x).cos().mean(-1) - 1)
        return (value * self.modes + fine).sum(-1)

    def rate(self, results: Tensor, prompts: Tensor) -> Tensor:
        """r (B,), counted."""
        values = self.reward(results)
        self.count_scores(values, prompts)
        return values

    def soft_value(self, rows: Rows) -> Tensor:
        """The exact V_t(x) for lambda = 1, without detail: the reward of the noisy posterior of the modes."""
        level = self.schedule.level(rows.steps)
        posterior = self.posterior(rows.x, level.alpha[:, None, None], level.sigma[:, None, None])
        return ((posterior + self.log_w).logsumexp(-1) - self.log_w[-1]).sum(-1)

    def mode(self, x: Tensor) -> Tensor:
        """Index of the nearest mode, (..., planes)."""
        return (x[..., None, :] - self.centres).norm(dim=-1).argmin(-1)

    def total_variation(self, samples: Tensor) -> float:
        """Mean over planes of the distance of mode frequencies from the target's."""
        counts = torch.nn.functional.one_hot(self.mode(samples), MODES).double().mean(0)
        return float(0.5 * (counts - self.target).abs().sum(-1).mean())
