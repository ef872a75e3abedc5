"""Tensors on disk by what they were computed from: what is slow to compute is computed once, for all runs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MAX_BYTES = 64 * 2**30
KEEP_FREE = 2 * 2**30
"""Bytes of the disk that stay free for others, such as checkpoints."""

logger = logging.getLogger(__name__)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors with their names, types and shapes, wherever they are."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous()
        found.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        if array.numel():
            found.update(array.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_folder(cache: str | Path) -> None:
    """Raises ValueError where the folder of a `TensorCache` could not be made or written to; nothing is made."""
    folder = Path(cache).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cache = {cache}: {there} is no folder; name another")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cache = {cache}: {there} cannot be written to; name another folder")


class TensorCache:
    """A folder of safetensors files, each under the sha256 of what its tensors were computed from.

    Processes and runs may share a folder: a file is there whole or not at all. It carries the digest of its tensors;
    one that is damaged counts as absent, with a warning. Nothing is ever removed: a folder that holds `max_bytes`, or
    whose disk has fewer than `KEEP_FREE` bytes left, takes no more, which is told once. A folder that is removed is
    made again. A file that cannot be written for another reason than a full disk costs itself alone; the first is told.

    Args:
        folder: made if it is not there.
        max_bytes: that the folder may hold; processes that write together pass it by a sixteenth each at most.

    Raises ValueError for a folder that cannot be made or written to.
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        check_folder(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache = {folder} cannot be made ({error}); name another folder") from None
        self._full = self._failed = False
        self._held = self._new = 0  # bytes when they were last counted, and put there since
        self._counted = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the host; None where there are none, or where they are damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # it is no mapping: it has no items
                tensors = {name: file.get_tensor(name) for name in names}
                told = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s) and is computed again", path, error)
            return None
        if told != digest(tensors):
            logger.warning("%s is damaged (its content has changed) and is computed again", path)
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keeps tensors; whether it did."""
        if self._full:
            return False
        # Copies, since safetensors refuses tensors that share memory.
        kept = {n: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for n, tensor in tensors.items()}
        data, path = save(kept, {"sha256": digest(kept)}), self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._has_room(len(data)):
                return False
            _write(path, data)
        except OSError as error:
            self._fail(path, error)
            return False
        self._new += len(data)
        return True

    def _fail(self, path: Path, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._refuse(f"cannot be written to ({error})")
        elif not self._failed:
            self._failed = True
            logger.warning("%s cannot be written (%s): it stays in main memory, as will others like it", path, error)

    def _has_room(self, size: int) -> bool:
        # Others may write too, so the folder is looked at again from time to time.
        if not self._counted or self._new > self.max_bytes // 16:
            self._held, self._new, self._counted = _size(self.folder), 0, True
        if self._held + self._new + size > self.max_bytes:
            self._refuse(f"holds {self.max_bytes:,} bytes, the most that are kept; remove it to start it anew")
        elif shutil.disk_usage(self.folder).free - size < KEEP_FREE:
            self._refuse(f"is on a disk with fewer than {KEEP_FREE:,} free bytes")
        return not self._full

    def _refuse(self, reason: str) -> None:
        self._full = True
        logger.warning("the cache %s %s: what is new stays in main memory", self.folder, reason)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{uuid4().hex}.tmp")  # and not of `tempfile`, which others may not read
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, what a crash left of a write included."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # renamed meanwhile
                total += os.stat(os.path.join(root, name)).st_size
    return total
