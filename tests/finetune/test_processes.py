"""Contract: gradients are equal across ranks, and two processes are one process with both their batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(out, world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for r in range(world)
    ]
    out.mkdir()
    command = [sys.executable, str(SCRIPT), str(out)]
    environments = [common | rank for rank in ranks] if world > 1 else [common]
    started = [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for e in environments]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return [load_file(out / f"{r}.safetensors") for r in range(world)]


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(tmp_path):
    (one,) = launch(tmp_path / "one", 1)
    first, second = launch(tmp_path / "two", 2)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Sums of float32 in another order; Adam's first steps divide by the gradient's own size.
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=2e-6, msg=name)
