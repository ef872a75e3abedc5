"""Addressed noise: the same address gives the same numbers, different addresses are independent."""

import hashlib

import numpy as np
import pytest
import torch

from diffalign.noise import generator, normal


def draw(rows: list[tuple[int | str, ...]], **changes: object) -> torch.Tensor:
    arguments: dict = {"seed": 0, "purpose": "step", "step": 3, "dtype": torch.float64} | changes
    return normal((4, 5), rows=rows, **arguments)


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows = [(7, 0), (7, 1), ("a", 0)]
    together = draw(rows)
    alone = torch.cat([draw([row]) for row in reversed(rows)]).flip(0)
    assert torch.equal(together, alone)


def test_every_part_of_the_address_matters() -> None:
    base = draw([(1, 2)])
    others = [
        draw([(1, 2)], seed=1),
        draw([(1, 2)], purpose="initial"),
        draw([(1, 2)], step=4),
        draw([(1, 3)]),
        draw([("1", 2)]),
        draw([(1, 2, 0)]),
        draw([(12,)]),
    ]
    tensors = [base, *others]
    for i, first in enumerate(tensors):
        for second in tensors[i + 1 :]:
            assert not torch.equal(first, second)


def test_types_agree_up_to_one_rounding() -> None:
    exact = draw([(1, 2)])
    assert torch.equal(draw([(1, 2)], dtype=torch.float32), exact.float())
    assert torch.equal(draw([(1, 2)], dtype=torch.bfloat16), exact.to(torch.bfloat16))


def test_the_stream_is_philox_keyed_by_blake2b() -> None:
    """The numbers are part of the interface: old runs must be repeatable, so the address is fixed."""
    digest = hashlib.blake2b(b'["generator", 0, "truncation", [5], 0]', digest_size=16).digest()
    expected = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    assert generator(0, "truncation", 5).integers(0, 2**62) == expected.integers(0, 2**62)


def test_rows_are_standard_normal_and_uncorrelated() -> None:
    sample = normal((1000,), seed=3, purpose="initial", rows=[(i, 0) for i in range(64)], dtype=torch.float64)
    assert abs(sample.mean().item()) < 4 / 64_000**0.5
    assert abs(sample.var().item() - 1) < 4 * (2 / 64_000) ** 0.5
    correlation = torch.corrcoef(sample) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max().item() < 5 / 1000**0.5


def test_bad_addresses_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"1\.5 is a float: use integers and strings"):
        draw([(1.5, 0)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="bool"):
        draw([(True, 0)])
