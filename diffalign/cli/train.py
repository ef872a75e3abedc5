"""`diffalign train`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from diffalign.cli.plugins import load_plugin
from diffalign.config import Recipe, load_recipe
from diffalign.recipe_references import DRAWN


def run(recipe: str, overrides: Sequence[str], plugins: Sequence[Path], *, dry_run: bool = False) -> None:
    """Checks the whole recipe, then trains and prints where the report is; or tries it out and prints what held."""
    if dry_run:
        try_out(recipe, overrides, plugins)
        return
    checked = load_checked(recipe, overrides, plugins)

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


def load_checked(
    recipe: str, overrides: Sequence[str], plugins: Sequence[Path], absent: Collection[str] = ()
) -> Recipe:
    """Runs the plug-ins and checks the whole recipe, before anything heavy is imported; `absent` as `load_recipe`."""
    for plugin in plugins:
        load_plugin(plugin)
    return load_recipe(recipe, overrides, absent)


def try_out(recipe: str, overrides: Sequence[str], plugins: Sequence[Path]) -> None:
    """Checks the whole recipe, but for what is not drawn yet, runs a small copy and prints what held."""
    checked = load_checked(recipe, overrides, plugins, absent=DRAWN)

    from diffalign.cli.terminal import only_errors, quiet_loading
    from diffalign.engine.dry_run import dry_run

    quiet_loading()
    only_errors()  # tiny tokenizers cut prompts off, which says nothing about the recipe
    print(dry_run(checked))
