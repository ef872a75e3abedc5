"""`diffalign train`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from diffalign.config import Problem, Recipe, RecipeError, load_recipe


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


def load_plugin(path: Path) -> None:
    """Runs a Python file of the user's, which registers what it brings; recipes may then name it."""
    if not path.is_file():
        raise RecipeError("--plugin", [Problem(str(path), "does not exist: give the path of a Python file")])
    name = f"diffalign_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError("--plugin", [Problem(str(path), "is no Python file: its name must end in .py")])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    Recipe.model_rebuild(force=True)  # methods that it registered become names that `method` may have
