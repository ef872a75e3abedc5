"""A contract as a table in Markdown: a row for each thing, a column for each promise."""

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def print_table(kind: str, things: Mapping[str, T], promises: Mapping[str, Callable[[T], str]]) -> None:
    """Prints what each promise measured of each thing; one that is not kept says so in its cell, none is empty."""
    print(f"| {kind} | " + " | ".join(promises) + " |\n" + "| --- " * (len(promises) + 1) + "|")
    for name, thing in things.items():
        cells = [_cell(promise, thing) for promise in promises.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _cell(promise: Callable[[T], str], thing: T) -> str:
    try:
        return promise(thing) or "**empty**"
    except AssertionError as error:
        return f"**broken** {error}".splitlines()[0]
