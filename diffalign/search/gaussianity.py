r"""How plausible noise is: what keeps optimised noise where the generator was trained.

Each regulariser is a function of noise (B, ...), n elements a row, that is 0 at its best and negative elsewhere, (B,);
an optimiser adds it to the reward. They see different things. `chi` sees the norm alone, so that a checkerboard of the
right norm is perfect to it; `spectrum` and `covariance` see patterns too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

_SIZE = 4 * 64 * 64
"""n of the generators that ReNO's gamma was chosen for: 512 pixels of Stable Diffusion."""
_BIN, _SPECTRUM_WEIGHT = 16, 25.0
_BLOCK, _SHUFFLES = 4, 10


def chi(noise: Tensor) -> Tensor:
    r"""Log p(||x||) - log p(sqrt(n - 1)) under the chi law of n degrees, which the norm of normal noise has, in nats.

    ReNO's regulariser, after Samuel et al. 2023 (arXiv 2306.08687): log p(r) = (n - 1) log r - r^2 / 2 + const, whose
    mode is sqrt(n - 1). It is computed as (n - 1) / 2 (log(1 + e) - e) with e = r^2 / (n - 1) - 1: the terms
    themselves, ten thousands for a latent of real size, leave few digits in fp32 and are infinite in fp16.
    """
    flat = _flat(noise)
    excess = flat.square().sum(1) / (flat.shape[1] - 1) - 1
    return 0.5 * (flat.shape[1] - 1) * (excess.log1p() - excess)


def chi_of_size(noise: Tensor, generator: np.random.Generator) -> Tensor:
    """`chi` times 16,384 / n: a weight then means the same share of the norm at every size of the latent.

    The norm's drift by a share s costs about n s^2 nats, so that a weight for nats grows stricter with n. ReNO's
    gamma = 0.01 is unchanged at 16,384 elements (SD-Turbo, SDXL-Turbo and PixArt at 512 pixels).
    """
    return chi(noise) * (_SIZE / noise[0].numel())


def spectrum(noise: Tensor, generator: np.random.Generator) -> Tensor:
    r"""Two moments and the power spectrum against those of white noise, Hwang et al. 2025 (arXiv 2509.07027).

    Minus [ |mean x| + | sqrt(mean x^2) - 1 | + 25 mean_bins | mean_{k in bin} |X_k| / sqrt(n) - sqrt(pi) / 2 | ], with
    X the Fourier transform of the flattened row, in bins of 16 frequencies. X_k / sqrt(n) of white noise is complex
    normal of variance 1, and the mean of its modulus is sqrt(pi) / 2; so bins of 16 leave a floor of 25 x 0.092 that no
    noise is to fall below. Departures:

    - The spectrum is taken of the row as it lies and of a random permutation, and averaged. Of a permutation alone,
      which the paper takes, a checkerboard looks white: it has two values, and their order is what is wrong with it.
    - The frequencies 0 and n / 2, whose X_k are real, are left out.
    - The weights and the bin size are as others report them of the paper, and not verified.
    """
    flat = _flat(noise)
    orders = torch.stack([flat, flat[:, _permutations(flat, 1, generator)[0]]], 1)
    modulus = torch.fft.rfft(orders, norm="ortho").abs()[..., 1 : (flat.shape[1] + 1) // 2]
    bins = avg_pool1d(modulus, _BIN, ceil_mode=True)  # the last one has what is left
    white = (bins - math.sqrt(math.pi) / 2).abs().mean((1, 2))
    moments = flat.mean(1).abs() + (flat.square().mean(1).sqrt() - 1).abs()
    return -moments - _SPECTRUM_WEIGHT * white


def covariance(noise: Tensor, generator: np.random.Generator) -> Tensor:
    r"""Bounds on how probable the mean and the covariance of blocks of noise are: the regulariser of DNO, in nats.

    Tang et al. 2024 (arXiv 2405.18881), as their code has it. The row is cut into m blocks of k = 4 elements, with mean
    a and second moment C; by concentration

        log p_1 = min(0, log 2 - m ||a||^2 / (2 k)),
        log p_2 = min(0, log 2 - m max(0, sqrt(1 + ||C - I||_2) - 1 - sqrt(k / m))^2 / 2),

    of the row as it lies, plus their mean over random permutations. Departures: 10 permutations in place of 100, drawn
    anew at each evaluation; log 2 is counted, so that the most that a bound can say is 0.
    """
    flat = _flat(noise)
    blocks = flat.shape[1] // _BLOCK
    orders = [flat[:, None], flat[:, _permutations(flat, _SHUFFLES, generator)]]
    return sum(_block_bounds(order[..., : blocks * _BLOCK], blocks) for order in orders)  # type: ignore[return-value]


def _block_bounds(rows: Tensor, blocks: int) -> Tensor:
    """Log p_1 + log p_2 of rows (B, R, n), their mean over R, (B,)."""
    cut = rows.unflatten(-1, (blocks, _BLOCK))
    far = cut.mean(-2).square().sum(-1)
    second = cut.mT @ cut / blocks - torch.eye(_BLOCK, dtype=rows.dtype, device=rows.device)
    most = torch.linalg.eigvalsh(second).abs().amax(-1)
    beyond = ((1 + most).sqrt() - 1 - math.sqrt(_BLOCK / blocks)).clamp(min=0)
    bounds = [blocks * far / (2 * _BLOCK), blocks * beyond.square() / 2]
    return sum((math.log(2) - bound).clamp(max=0) for bound in bounds).mean(-1)  # type: ignore[union-attr]


def _flat(noise: Tensor) -> Tensor:
    return noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32))


def _permutations(flat: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """(count, n) orders of the elements, the same for all rows: none depends on its neighbours in the batch."""
    drawn = np.stack([generator.permutation(flat.shape[1]) for _ in range(count)])
    return torch.from_numpy(drawn).to(flat.device)


REGULARISERS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "chi": chi_of_size,
    "spectrum": spectrum,
    "covariance": covariance,
}
