"""The command line. Nothing heavy is imported before a command needs it: help, listings and refusals answer at once."""

from __future__ import annotations

import sys

from diffalign.cli.app import app
from diffalign.cli.errors import explained

__all__ = ["app", "main"]


def main() -> None:
    """Runs a command and exits: 0 done, 2 a config or an input that is wrong, in words, 1 anything else."""
    try:
        app()
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        message, status = known
        print(message, file=sys.stderr)
        sys.exit(status)
