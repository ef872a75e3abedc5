"""Scores by content: the same pixels, words and reward are scored once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffalign.rewards import FunctionReward, Reward
from diffalign.scoring.items import Item


def pixel_digest(pixels: Tensor) -> bytes:
    """Of uint8 pixels: sha256 of the shape and the levels."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    digest.update(pixels.flatten().numpy())
    return digest.digest()


def key(
    pixels: bytes, item: Item, reward: Reward, fingerprint: str, files: Mapping[str, list[str]] | None = None
) -> bytes:
    """The address of a score: what the reward sees of the pixels, the prompt and the metadata, and what it is itself.

    A function says nowhere what it reads, so all that it gets is in the key.

    Args:
        pixels: their digest.
        item: whose prompt and metadata.
        reward: what scores it.
        fingerprint: of the reward.
        files: key of the metadata -> digests of the files that it names, which stand for their names.
    """
    reads_all = isinstance(reward, FunctionReward)
    prompt = item.prompt if reads_all or "prompt" in reward.needs else None
    reads = reward.needs + reward.optional
    metadata = {k: v for k, v in item.metadata.items() if (reads_all or k in reads) and k not in (files or {})}
    told = hashlib.sha256(
        json.dumps([prompt, metadata, *([files] if files else [])], sort_keys=True, default=str).encode()
    ).digest()
    return hashlib.sha256(pixels + told + fingerprint.encode()).digest()


class Cache:
    """Scores in an SQLite file, which several processes of one machine may use together. Failures are not kept.

    Raises ValueError where the file is something else, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(file, timeout=60)
            self._base.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value REAL) WITHOUT ROWID")
        except (sqlite3.DatabaseError, OSError) as error:
            raise ValueError(
                f"{file} cannot be used as a cache ({error}): remove it, or name another folder."
            ) from error

    def get(self, key: bytes) -> float | None:
        """The score of a key, or None."""
        row = self._base.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Keeps scores, all of them or none."""
        with self._base:
            self._base.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", scores.items())

    def close(self) -> None:
        """Closes the file."""
        self._base.close()
