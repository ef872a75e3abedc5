"""`diffalign train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.cli.plugins import load_plugin
from diffalign.config import Recipe, load_recipe


def run(recipe: str, overrides: Sequence[str], plugins: Sequence[Path], *, dry_run: bool = False) -> None:
    """Checks the whole recipe, then trains and prints where the report is; or tries it out and prints what held."""
    checked = load_checked(recipe, overrides, plugins)
    if dry_run:
        _try_out(checked)
        return

    from diffalign.cli.figures import print_figures
    from diffalign.cli.terminal import quiet_loading
    from diffalign.engine.run import train
    from diffalign.processes import process_state

    quiet_loading()
    report = train(checked)
    if process_state().is_main_process:
        if (report.parent / "summary.json").exists():  # not of a reward
            print_figures(report.parent)
        print(f"report: {report}")


def load_checked(recipe: str, overrides: Sequence[str], plugins: Sequence[Path]) -> Recipe:
    """Runs the plug-ins and checks the whole recipe, before anything heavy is imported."""
    for plugin in plugins:
        load_plugin(plugin)
    return load_recipe(recipe, overrides)


def _try_out(recipe: Recipe) -> None:
    from diffalign.cli.terminal import only_errors, quiet_loading
    from diffalign.engine.dry_run import dry_run

    quiet_loading()
    only_errors()  # tiny tokenizers cut prompts off, which says nothing about the recipe
    print(dry_run(recipe))
