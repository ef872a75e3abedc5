"""How often rewards agree with people, on local copies of the published preference sets: `diffalign score bench`.

Names are imported when they are asked for, so that a refusal of the command line does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.scoring.bench.run import BenchResult, bench

__all__ = ["BenchResult", "bench"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from diffalign.scoring.bench import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
