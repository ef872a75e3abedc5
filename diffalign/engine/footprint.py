"""How much memory a training step will take, from what two small ones took."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffalign.data import Prompt
from diffalign.engine.machine import available_memory
from diffalign.finetune import Trainer


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a training step in bytes, with everything that is loaded.

    Attributes:
        images: with gradient at once, as the recipe says.
        peak: estimate for that many.
        per_image: what each of them adds.
        room: what the device has for this process.
    """

    images: int
    peak: int
    per_image: int
    room: int

    @property
    def fitting(self) -> int:
        """Images at once that would fit, with a tenth to spare; 0 where not even one does."""
        fixed = self.peak - self.images * self.per_image
        return max(0, int((0.9 * self.room - fixed) / max(self.per_image, 1)))

    @property
    def micro_batch_size(self) -> int:
        """Images at once in the fewest equal parts that fit, one where not even one fits."""
        parts = math.ceil(self.images / max(1, self.fitting))
        return math.ceil(self.images / parts)


def footprint(trainer: Trainer, prompts: Sequence[Prompt]) -> Footprint | None:
    """Estimates the peak of a step of this trainer; None where memory cannot be measured (a CPU other than Linux's).

    One and two images go forward and backward, the first of them twice, since the first pass of all also loads code.
    Adam's two moments, which come with its first step, are added, and what an online method keeps of all its samples.
    The line through the two is the estimate: in 24 images of shapes-sd on the CPU it is off by a tenth.
    """
    settings = trainer.training
    own = settings.num_prompts_per_step * settings.group_size // trainer.accelerator.num_processes
    # What an online method has sampled it trains on minibatch after minibatch.
    asked = trainer.images // trainer.accelerator.num_processes
    images = asked if settings.micro_batch_size == "auto" else min(settings.micro_batch_size, asked)
    device, kept = trainer.policy.device, [0]
    trainer.training = settings.model_copy(update={"group_size": 1, "micro_batch_size": "auto"})
    try:
        counts = (1, 1, 2)[: 2 + (images > 1)]
        peaks = [peak(device, lambda n=n: kept.append(_gradient(trainer, prompts[:n]))) for n in counts]
    finally:
        trainer.training = settings
    if peaks[-1] is None:
        return None
    one, last = peaks[1], peaks[-1]
    moments = 2 * sum(p.numel() * p.element_size() for p in trainer.parameters)
    per_image = max(0, last - one - kept[-1]) if images > 1 else 0
    whole = one + per_image * (images - 1) + kept[-1] * (own - 1) + moments
    return Footprint(images, whole, per_image, room(device))


def _gradient(trainer: Trainer, prompts: Sequence[Prompt]) -> int:
    """A step up to the optimiser, whose weights and step it leaves alone; returns what an image keeps."""
    with trainer.accelerator.autocast():
        kept = trainer.probe(prompts)
    trainer.optimizer.zero_grad(set_to_none=True)
    return kept


def peak(device: torch.device, work: Callable[[], object]) -> int | None:
    """Most bytes that torch held on a CUDA device, or this process in main memory, while it did some work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or sys.platform != "linux" or not clear.exists():
        return None
    # What was freed and not given back to the system would hide what the work takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    clear.write_text("5")  # the high-water mark starts again: proc(5)
    work()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def room(device: torch.device) -> int:
    """Bytes that this process may hold on a device, with what it holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return available_memory() + psutil.Process().memory_info().rss
