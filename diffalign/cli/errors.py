"""Which errors are the user's to mend, told in their own words, and which are ours, with a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

from diffalign.recipe_problems import RecipeError
from diffalign.registry import UnknownName

WRONG_INPUT = 2
FAILED = 1

PACKAGE = Path(__file__).resolve().parent.parent
# Ends of a job that were foreseen; by name, because importing the modules would load torch for every refusal.
FORESEEN = {"Interrupted", "CheckpointNotSaved", "DiskRefused", "StepFailed"}


def explained(error: Exception) -> tuple[str, int] | None:
    """The message and exit status of an error that needs no traceback, or None.

    This package raises ValueError and the like only for what it was given, with the value and the remedy in the
    message; from a library below the same types may mean anything, and keep their traceback.
    """
    if isinstance(error, RecipeError | UnknownName):
        return str(error), WRONG_INPUT
    if type(error).__name__ in FORESEEN and _raised_here(error):
        return str(error), FAILED
    if isinstance(error, ValueError | FileNotFoundError | FileExistsError) and _raised_here(error):
        return str(error), WRONG_INPUT
    return None


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
