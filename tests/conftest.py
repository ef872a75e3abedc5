"""What every test stands on: offline, one thread, seeded, and nothing left behind for the next."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

# Before torch and the hub's client are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "passive",
    "MPLBACKEND": "Agg",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from diffalign._compat import ensure_torchvision

ensure_torchvision()

# accelerate and torch.distributed speak to their subprocesses by these.
LIBRARY_VARIABLES = (
    "ACCELERATE_",
    "KMP_",
    "TORCH",
    "CUDA_",
    "PYTEST_",
    "TF_",
    "GRPC_",
    "FORK_LAUNCHED",
    "PYTORCH_",
    "OMP_",
)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """The environment, the working directory and torch's global switches are as the test found them."""
    before = _global_state()
    yield
    after = _global_state()
    changed = {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}
    assert not changed, f"the test leaves a global change behind: {changed}"


def _global_state():
    state = {f"env {k}": v for k, v in os.environ.items() if not k.startswith(LIBRARY_VARIABLES)}
    state["working directory"] = os.getcwd()
    torch = sys.modules.get("torch")
    if torch is not None:
        state |= {
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    return state


@pytest.fixture(autouse=True, scope="session")
def _offline():
    """A connection to anything but this machine fails at once, with the address in the message."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests are offline, and this one connects to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def with_open_clip():
    """Runs Python code, in a process of its own, where open_clip can be imported; returns what it prints.

    `make test` keeps open_clip and the torchvision that it needs out of the environment that everything else runs in.
    """
    folders = [str(Path(__file__).parent.parent / ".venv" / "open_clip"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}
    start = "from diffalign._compat import ensure_torchvision; ensure_torchvision()\n"

    def run(code):
        done = subprocess.run([sys.executable, "-c", start + code], env=environment, capture_output=True, text=True)
        if "No module named 'open_clip'" in done.stderr:
            pytest.skip("open_clip is not installed: make test brings it")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
