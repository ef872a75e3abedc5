"""Scores of images that lie in files, with any rewards: what `diffalign score` does.

Names are imported when they are asked for, so that a refusal of the command line does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.scoring.run import Result, score
    from diffalign.scoring.summary import RewardSummary

__all__ = ["Result", "RewardSummary", "score"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffalign.scoring import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
