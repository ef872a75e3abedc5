"""`diffalign score bench`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffalign.cli.errors import FAILED
from diffalign.cli.score import batch_size_of
from diffalign.scoring.bench.request import BenchRequest

if TYPE_CHECKING:
    from diffalign.scoring.bench import BenchResult


def run(
    dataset: str,
    folder: Path,
    *,
    rewards: Sequence[str],
    images: Path | None,
    out: Path,
    batch_size: str,
    cache: Path | None,
) -> None:
    """Scores and compares, and prints what came of it; exits with 1 where no pair could be judged."""
    request = BenchRequest(  # refuses before anything heavy is imported
        dataset=dataset,
        folder=folder,
        rewards=tuple(rewards),
        out=out,
        images=images,
        batch_size=batch_size_of(batch_size),
        cache=cache,
    )

    from diffalign.cli.terminal import quiet_loading
    from diffalign.processes import process_state
    from diffalign.scoring.bench.run import run_request

    quiet_loading()
    result = run_request(request)
    if process_state().is_main_process:
        _tell(result)
        if not any(row.agreement.pairs for row in result.rows):
            sys.exit(FAILED)


def _tell(result: BenchResult) -> None:
    from diffalign.scoring.summary import most_frequent

    column, several = result.dataset.column, len(result.unlabelled) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("reward", overflow="fold")
    heads = ["labels"] if several else []
    heads += ["pairs", "tied", "left out", "accuracy, %", "with ties, %", *([f"{column}, %"] if column else [])]
    for head in heads:
        table.add_column(head, justify="left" if head == "labels" else "right", no_wrap=True)
    for row in result.rows:
        found = row.agreement
        cells = [row.labels] if several else []
        cells += [f"{count:,}" for count in (found.pairs, found.ties, found.left_out)]
        cells.append(_percent(found.accuracy, found.low, found.high))
        cells.append(_percent(found.with_ties, found.with_ties_low, found.with_ties_high))
        table.add_row(Text(row.reward), *cells, *([_percent(row.published)] if column else []))
    console = Console(highlight=False)
    console.print(table)
    print("accuracy: of the pairs that people did not tie; equal scores are wrong")
    print("with ties: of all pairs, at the tie threshold that is best on them")
    print("in brackets: 95 % bootstrap intervals over prompts")
    console.print(Text(f"{result.dataset.name}: {result.dataset.protocol}"), soft_wrap=True)
    for labels, count in result.unlabelled.items():
        if count:
            print(f"{labels}: {count:,} entries have no label and are left out")
    for name, reasons in result.failures.items():
        for reason, count in most_frequent(reasons):
            console.print(Text(f"{name}: {count:,} items x {reason}"), soft_wrap=True)
    print(f"accuracies: {result.out}")


def _percent(value: float | None, low: float = math.nan, high: float = math.nan) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" + (f" ({100 * low:.1f} to {100 * high:.1f})" if math.isfinite(low) else "")
