"""Rows of data files: the object of a line, and the texts in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

PROMPT_KEYS = ("prompt", "caption")  # the first that a row has


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


def take_text(row: dict[str, Any], keys: Sequence[str]) -> str:
    """Remove from a row what it has under the first of some keys that is there, and return it.

    Raises ValueError where there is none of them, or no text.
    """
    key = next((name for name in keys if name in row), keys[0])
    text = row.pop(key, None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key} is {text!r}, and must be a text that is not empty")
    return text
