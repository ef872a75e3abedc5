"""Whether a batch was too large for the memory."""

from __future__ import annotations

import torch


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was short; on a CPU torch says so in a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )
