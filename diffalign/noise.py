"""Addressed randomness: every random number is a function of where it is used, not of when it was drawn.

A tensor's address is (seed, purpose, row, step). Its 128-bit BLAKE2b digest keys a counter-based Philox generator
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on the host, so that the same address gives the
same numbers on every device, in every batch layout and on every rank.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

Address = tuple[int | str, ...]


def normal(
    shape: Sequence[int],
    *,
    seed: int,
    purpose: str,
    rows: Sequence[Address],
    step: int | Sequence[int] = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw one standard normal tensor for each addressed row.

    Args:
        shape: shape of one row, without the batch dimension.
        seed: the run's seed.
        purpose: what the noise is for, such as ``"initial"`` or ``"step"``; purposes are independent streams.
        rows: one address for each row, ``(prompt_id, sample_index)`` or ``(prompt_id, *node_path)``.
        step: index of the denoising step that uses the noise, of all rows or of each.
        device: where the result goes. The numbers are always drawn on the host.
        dtype: type of the result. Numbers are drawn in float64 and rounded once, so all types agree up to rounding.

    Returns:
        A tensor of shape ``(len(rows), *shape)``.

    Raises:
        TypeError: an address holds something that is neither an integer nor a string.
    """
    return _rows("standard_normal", "normal", shape, seed, purpose, rows, step, device, dtype)


def uniform(
    shape: Sequence[int],
    *,
    seed: int,
    purpose: str,
    rows: Sequence[Address],
    step: int | Sequence[int] = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw numbers in [0, 1) for each addressed row, in float64; arguments as of :func:`normal`."""
    return _rows("random", "uniform", shape, seed, purpose, rows, step, device, torch.float64)


def _rows(
    method: str,
    kind: str,
    shape: Sequence[int],
    seed: int,
    purpose: str,
    rows: Sequence[Address],
    step: int | Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> torch.Tensor:
    host = torch.empty((len(rows), *shape), dtype=dtype)
    steps = step if isinstance(step, Sequence) else [step] * len(rows)
    for index, (row, at) in enumerate(zip(rows, steps, strict=True)):
        draw = getattr(_philox(kind, seed, purpose, row, at), method)(tuple(shape))
        host[index] = torch.from_numpy(np.asarray(draw))
    if torch.device(device).type == "cuda":
        # From pinned memory the copy does not stop the host, which then can queue the next step's kernels.
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """Return the host generator of an address, for choices, shuffles and random truncation points."""
    return _philox("generator", seed, purpose, address, 0)


def _philox(kind: str, seed: int, purpose: str, address: Sequence[int | str], step: int) -> np.random.Generator:
    # JSON keeps 1 and "1" apart and quotes separators, so no two addresses share a text.
    text = json.dumps([kind, _part(seed), purpose, [_part(part) for part in address], _part(step)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _part(value: int | str) -> int | str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"noise address part {value!r} is a {type(value).__name__}: use integers and strings only")
