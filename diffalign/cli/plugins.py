"""`--plugin FILE.py`: rewards and methods of the user's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from diffalign.config import Problem, Recipe, RecipeError
from diffalign.search_recipe import SearchRecipe


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
    for model in (Recipe, SearchRecipe):
        model.model_rebuild(force=True)  # methods that it registered become names that `method` may have
