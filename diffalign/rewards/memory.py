"""Whether a batch was too large for the memory, and giving back what can be."""

from __future__ import annotations

import gc

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was short; on a CPU torch says so in a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def free_memory() -> None:
    """Drops what is garbage, and what torch keeps for later. Call it outside of `except`, which holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
