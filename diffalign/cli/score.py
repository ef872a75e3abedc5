"""`diffalign score`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffalign.cli.errors import FAILED
from diffalign.scoring.request import Request

if TYPE_CHECKING:
    from diffalign.scoring import Result


def run(
    inputs: Sequence[Path],
    *,
    rewards: Sequence[str],
    out: Path,
    prompts: str | None,
    prompt_column: str | None,
    batch_size: str,
    keep: float | None,
    per: str | None,
    shard: str,
    cache: Path | None,
) -> None:
    """Scores, and prints what came of it; exits with 1 where nothing has a score."""
    request = Request(  # refuses before anything heavy is imported
        inputs=tuple(inputs),
        rewards=tuple(rewards),
        out=out,
        prompts=prompts,
        prompt_column=prompt_column,
        batch_size=batch_size_of(batch_size),
        keep=keep,
        per=per,
        shard=_shard(shard),
        cache=cache,
    )

    from diffalign.cli.terminal import quiet_loading
    from diffalign.processes import process_state
    from diffalign.scoring.run import run_request

    quiet_loading()
    result = run_request(request)
    if process_state().is_main_process:
        _tell(result)
        if result.summaries and not any(summary.n for summary in result.summaries):
            sys.exit(FAILED)


def batch_size_of(text: str) -> int | None:
    """The number of `--batch-size`, None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ValueError(f"--batch-size {text}: give auto, or how many items to score at once.")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard {text}: give the number of this share and of all, such as 0/4, the first of four.")
    return int(number), int(count)


def _tell(result: Result) -> None:
    if result.missing:
        print(f"this share is done; {result.missing} parts of {result.out} are still missing")
        return
    from diffalign.scoring.gallery import interval, number

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("reward", overflow="fold")
    for head in ("scored", "failed", "cached", "prompts", "mean", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in result.summaries:
        counts = (each.n, each.failures, result.hits.get(each.name, 0), each.prompts)
        table.add_row(Text(each.name), *(f"{count:,}" for count in counts), number(each.mean), interval(each))
    console = Console(highlight=False)
    console.print(table)
    for each in result.summaries:
        for reason, count in each.reasons:
            console.print(Text(f"{each.name}: {count:,} x {reason}"), soft_wrap=True)
    for name, path in (("scores", result.out), ("kept", result.kept), ("gallery", result.gallery)):
        if path is not None:
            print(f"{name}: {path}")
