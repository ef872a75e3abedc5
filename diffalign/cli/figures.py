"""The figures of a finished run on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffalign.report import Figure, Summary

MEANING = {"training": "trained on", "heldout": "held out", "oracle": "oracle", "diversity": "diversity"}


def print_figures(run_dir: Path) -> None:
    """Base against tuned on the test prompts, from the run's summary.json."""
    summary = Summary.load(run_dir)
    table = Table("figure", "", "base", "tuned", "difference", "95 % interval, paired", title=summary.facts["test"])
    for figure in summary.figures:
        table.add_row(figure.name, MEANING[figure.kind], *cells(figure))
    Console().print(table)


def cells(figure: Figure) -> list[str]:
    """Base, tuned, difference and its interval in words; shares in percent and points."""
    scale, unit, points = (100, " %", " points") if figure.unit == "%" else (1, "", "")
    digits = 1 if figure.unit == "%" else 3
    interval = f"{scale * figure.low:+.{digits}f} to {scale * figure.high:+.{digits}f}"
    return [
        f"{scale * figure.base:.{digits}f}{unit}",
        f"{scale * figure.tuned:.{digits}f}{unit}",
        f"{scale * figure.difference:+.{digits}f}{points}",
        interval if figure.n > 1 else "one prompt only",
    ]
