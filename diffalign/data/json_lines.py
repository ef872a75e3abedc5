"""Lines of a JSONL, each an object."""

from __future__ import annotations

import json
from typing import Any


def line_object(raw: bytes, first: bool, expected: str) -> dict[str, Any] | None:
    """The object of a line, None for a blank one.

    Args:
        raw: the bytes of the line.
        first: whether it is the first of its file, which may begin with a byte order mark.
        expected: the keys that it is to have, for the message.

    Raises ValueError or RecursionError where there is no object.
    """
    line = raw.decode("utf-8-sig" if first else "utf-8").strip()
    if not line:
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with {expected}, found {type(row).__name__}")
    return row
