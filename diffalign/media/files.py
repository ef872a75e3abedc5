"""Files that may be hostile: opened only if regular and bounded, and whatever a decoder raises becomes one sentence."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    may be the address of something else. Warnings are silenced for all threads while any has a file open.

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
        with _silence, path.open("rb") as file:
            yield file
    except MediaError:
        raise
    except Exception as failure:
        # Decoders fail on broken bytes in every way there is: OSError, SyntaxError, struct.error, MemoryError.
        raise error(f"{shown(path)} cannot be read: {_reason(failure)}.") from failure


class _Silence:
    """No warnings while any thread is inside.

    The filters belong to the process, and `warnings.catch_warnings` puts back those that it found. Of two threads that
    leave in the order in which they came, the second would put back those of the first: silence, for good. So the first
    to come in sets them and the last to go puts them back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.filters = ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.filters.enter_context(warnings.catch_warnings(action="ignore"))
            self.inside += 1

    def __exit__(self, *failure: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.filters.close()


_silence = _Silence()


def shown(path: Path) -> str:
    """A file's name as it may stand in a message: what cannot be printed is escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _reason(failure: Exception) -> str:
    """In a few words, without the names of buffers and functions that libraries add to theirs."""
    told = " ".join(str(getattr(failure, "strerror", None) or failure).split()).rstrip(".")
    return told[:200] if told and told.isprintable() else type(failure).__name__
