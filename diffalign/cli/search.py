"""`diffalign search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffalign.cli.plugins import load_plugin
from diffalign.search_recipe import SearchRecipe, load_search_recipe


def run(recipe: str, overrides: Sequence[str], plugins: Sequence[Path]) -> None:
    """Checks the whole recipe, then searches, and prints what was found and where the report is."""
    for plugin in plugins:
        load_plugin(plugin)
    checked = load_search_recipe(recipe, overrides)

    from diffalign.cli.terminal import quiet_loading
    from diffalign.engine.search import search

    quiet_loading()
    report = search(checked)
    _tell(checked, report.parent)
    print(f"report: {report}")


def _tell(recipe: SearchRecipe, folder: Path) -> None:
    from diffalign.cli.figures import cells
    from diffalign.engine.search_results import read_rows
    from diffalign.report.search import reward_name, search_figures

    rows = read_rows(folder)
    table = Table("figure", "", "base", "found", "difference", "95 % interval, paired", title=f"{len(rows)} prompts")
    meaning = {"training": "selected by", "heldout": "held out", "oracle": "oracle"}
    for figure in search_figures(rows, reward_name(recipe)):
        table.add_row(figure.name, meaning[figure.kind], *cells(figure))
    Console().print(table)
