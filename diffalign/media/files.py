"""Files that may be hostile: opened only if regular and bounded, and whatever a decoder raises becomes one sentence."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class MediaError(ValueError):
    """A file that cannot be opened as what it should be; the message names the file and the reason in one sentence."""


class ImageError(MediaError):
    """A file that is not an image which may be opened."""


class VideoError(MediaError):
    """A file that is not a video which may be opened."""


@contextmanager
def reading(path: Path, error: type[MediaError], max_bytes: int) -> Iterator[BinaryIO]:
    """An open file for a decoder; what goes wrong inside becomes ``error``, and no warning comes out.

    The file is handed over open, so that no decoder sees its name: a name may be no UTF-8, and to a video library it
    may be the address of something else. Warnings are silenced for all threads while it is open.

    Raises:
        FileNotFoundError: there is no such name.
        MediaError: ``error``, for a folder, a device, a link to nothing, no or more than ``max_bytes`` bytes, or
            a decoder that fails.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{shown(path)} does not exist.")
    try:
        if not path.is_file():
            kind = "folder" if path.is_dir() else "device" if path.exists() else "link to nothing"
            raise error(f"{shown(path)} is a {kind}, not a file.")
        size = path.stat().st_size
        if size == 0:
            raise error(f"{shown(path)} is empty.")
        if size > max_bytes:
            raise error(f"{shown(path)} has {size:,} bytes: at most {max_bytes:,} are read.")
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            yield file
    except MediaError:
        raise
    except Exception as failure:
        # Decoders fail on broken bytes in every way there is: OSError, SyntaxError, struct.error, MemoryError.
        raise error(f"{shown(path)} cannot be read: {_reason(failure)}.") from failure


def shown(path: Path) -> str:
    """A file's name as it may stand in a message: what cannot be printed is escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _reason(failure: Exception) -> str:
    """In a few words, without the names of buffers and functions that libraries add to theirs."""
    told = " ".join(str(getattr(failure, "strerror", None) or failure).split()).rstrip(".")
    return told[:200] if told and told.isprintable() else type(failure).__name__
