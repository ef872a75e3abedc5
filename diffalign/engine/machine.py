"""What this machine is and can do, as far as training depends on it: versions, devices, types, attention, room."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign._compat import ensure_torchvision
from diffalign.versions import versions

GIB = 2**30

Fact = tuple[str, str]
"""What, and how it is here."""


def facts() -> Iterator[Fact]:
    """Versions, devices with the types that they compute in, threads, memory, disk, attention; a few seconds."""
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "torchvision", TORCHVISION[ensure_torchvision()]
    for device in devices():
        yield str(device), device_name(device)
        yield f"{device} types", ", ".join(f"{name}: {runs(name, device)}" for name in TYPES)
    policy = os.environ.get("OMP_WAIT_POLICY", "not set; passive is better where other programs share the cores")
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores; OMP_WAIT_POLICY {policy}"
    yield "memory", f"{available_memory() / GIB:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB free"
    yield "disk", f"{free_disk(Path.cwd()) / GIB:.1f} GiB free in {Path.cwd()}"
    yield from attention_backends(devices()[-1])


TORCHVISION = {
    "absent": "not installed: rewards of open_clip and timm need it, nothing else",
    "native": "works",
    "repaired": "built for another torch: its transforms work, its compiled part does not",
}
TYPES = ("float32", "bfloat16", "float16")


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch sees; the last is the one to train on."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus, *([torch.device("mps")] if torch.backends.mps.is_available() else [])]


def device_name(device: torch.device) -> str:
    """Model and memory of a device."""
    if device.type != "cuda":
        return platform.processor() or platform.machine()
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / GIB:.1f} GiB"


def runs(dtype: str, device: torch.device) -> str:
    """Whether a convolution and a matrix product run forward and backward in a type, "yes" or "no"."""
    kind = getattr(torch, dtype)
    try:
        x = torch.ones(1, 4, 8, 8, device=device, dtype=kind, requires_grad=True)
        weight = torch.ones(4, 4, 3, 3, device=device, dtype=kind)
        y = torch.nn.functional.conv2d(x, weight).flatten(1)
        (y @ y.T).sum().backward()
    except (RuntimeError, NotImplementedError):
        return "no"
    return "yes"


def available_memory() -> int:
    """Bytes of main memory that this process may still take; a container's limit counts."""
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such container, or one without a limit, "max"
        return free


def free_disk(path: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())).free


def attention_backends(device: torch.device) -> Iterator[Fact]:
    """Each attention backend of diffusers: the kernels that ran, forward and backward, or why it does not run."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    reasons: dict[str, list[str]] = {}
    for name in (each.value for each in AttentionBackendName):
        if name.endswith("_hub"):
            reasons.setdefault("not tried, diffusers would download them", []).append(name)
            continue
        try:
            yield f"attention {name}", kernels(name, device)
        except Exception as error:  # a backend may lack its library, its device or a backward pass, each in its own way
            reasons.setdefault(_reason(error), []).append(name)
    for reason, names in reasons.items():
        yield "no attention", f"{', '.join(names)}: {reason}"


class Kernels(TorchDispatchMode):
    """Writes down the attention operators that torch dispatches, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator."""
        name = func.overloadpacket.__name__
        if any(word in name for word in ("attention", "flash", "fmha", "sage")):
            self.ran[name.removeprefix("_scaled_dot_product_")] = None
        return func(*args, **(kwargs or {}))


def kernels(backend: str, device: torch.device) -> str:
    """The attention kernels that a backend ran forward and backward on a tiny tensor; raises where it does not run."""
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(1, 128, 2, 64, device=device, dtype=kind, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings(), attention_backend(backend), Kernels() as seen:
        warnings.simplefilter("ignore")  # of a kernel that is slow without compilation
        dispatch_attention_fn(query, key, value).sum().backward()
    return ", ".join(seen.ran) or "no kernel of its own: plain matrix products, forward and backward"


def _reason(error: Exception) -> str:
    if "not usable" in str(error):
        return "their libraries are not installed"
    return str(error).split(". ")[0].split("\n")[0][:100]
