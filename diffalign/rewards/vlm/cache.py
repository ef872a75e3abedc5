"""Answers that a server gave, kept on disk: one small JSON file for each question, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.media import to_uint8


def digest(request: Mapping[str, Any]) -> str:
    """sha256 of a JSON value, the same for the same content whatever the order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def pixel_digest(image: Tensor) -> str:
    """sha256 of the size and the 8-bit pixels of an image (3, H, W) in [0, 1]."""
    pixels = to_uint8(image).cpu().contiguous()
    return hashlib.sha256(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes()).hexdigest()


class AnswerCache:
    """A folder of answers by the digest of their question. Several processes may share it.

    Args:
        folder: made when the first answer is kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer, or None where there is none. A file that cannot be read counts as none: it is asked again."""
        try:
            answer = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keeps an answer; after a crash the file is there with all of it, or not there."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(answer, file)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
