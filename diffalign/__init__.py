"""diffalign: make image generators prefer what you reward. Fine-tune, search and score from configs and from Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign import finetune as finetune
    from diffalign import rewards as rewards
    from diffalign import search as search
    from diffalign.policies import Policy as Policy

__version__ = "0.1.0"
__all__ = ["Policy", "finetune", "rewards", "search"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `diffalign ls` and a wrong recipe answer without loading torch.
    if name == "Policy":
        from diffalign.policies import Policy

        return Policy
    if name in ("finetune", "rewards", "search"):
        return importlib.import_module(f"diffalign.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
