"""Contract: gradients are equal across ranks, and two processes are one process with both their batches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import start

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(out, world):
    out.mkdir()
    for status, errors in start(SCRIPT, [out], world):
        assert status == 0, errors
    return [load_file(out / f"{r}.safetensors") for r in range(world)]


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(tmp_path):
    (one,) = launch(tmp_path / "one", 1)
    first, second = launch(tmp_path / "two", 2)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Sums of float32 in another order; Adam's first steps divide by the gradient's own size.
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=2e-6, msg=name)
