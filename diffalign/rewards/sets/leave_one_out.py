"""Spectra of a scatter matrix with each of its rows left out in turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**24  # numbers in one batch of matrices: 128 MiB


def downdated_spectra(rows: Tensor, weight: float) -> Iterator[Tensor]:
    """Eigenvalues of ``R^T R - weight r_i r_i^T`` for every row r_i of R.

    A rank-one downdate of one matrix, then a symmetric eigendecomposition for each row, in batches of bounded memory:
    O(n min(n, D)^3) in all. Eigenvalues that are rounding errors of zero come out as zero.

    Args:
        rows: R, (n, D) float64.
        weight: 1 for rows about a fixed origin, n / (n - 1) for rows centred at their own mean.

    Yields:
        (block, min(n, D)) eigenvalues, not negative, row after row of R.
    """
    if rows.shape[1] > len(rows):  # the spectra depend on the Gram matrix alone, which these (n, n) share
        rows = torch.linalg.qr(rows.T, mode="r").R.T
    size = rows.shape[1]
    whole = rows.T @ rows
    floor = torch.linalg.eigvalsh(whole)[-1] * size * torch.finfo(rows.dtype).eps
    for block in rows.split(max(1, _BLOCK // size**2)):
        eigenvalues = torch.linalg.eigvalsh(whole - weight * block[:, :, None] * block[:, None, :])
        yield eigenvalues.where(eigenvalues > floor, 0.0)
