"""Start a script as several processes that speak over gloo, as torchrun would."""

import os
import socket
import subprocess
import sys


def start(script, arguments, world):
    """(exit status, stderr) of each rank, when all have ended; one process with world = 1 knows of no others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
    command = [sys.executable, str(script), *map(str, arguments)]
    started = [subprocess.Popen(command, env=common | rank, stderr=subprocess.PIPE, text=True) for rank in ranks]
    errors = [process.communicate()[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]
