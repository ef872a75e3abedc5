"""Inference-time search: better samples from a pipeline that stays as it is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffalign.search.config import METHODS

if TYPE_CHECKING:
    from diffalign.search.base import Search

# Lazy, so that recipes are validated without importing torch.
_HOMES = {
    "BestOfN": "best_of_n",
    "Budget": "budget",
    "DAS": "twisted",
    "DNO": "dno",
    "Found": "found",
    "Gibbs": "gibbs",
    "Guidance": "guidance",
    "Importance": "best_of_n",
    "MaskedSpace": "masked",
    "NRG": "nrg",
    "PolicySpace": "policy_space",
    "ReNO": "reno",
    "SEARCHES": "base",
    "SMC": "smc",
    "SVDD": "svdd",
    "Search": "base",
    "Space": "space",
    "TDS": "twisted",
    "TreeSampling": "tree_sampling",
    "TreeSearch": "tree_search",
    "rejected": "best_of_n",
}

__all__ = ["METHODS", "search_class", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def search_class(method: str) -> type[Search]:
    """The search of a method by its recipe name, one of `METHODS`; UnknownName where none is registered."""
    for home in set(_HOMES.values()):
        import_module(f"{__name__}.{home}")  # registers its own
    from diffalign.search.base import SEARCHES

    return SEARCHES.get(method)
