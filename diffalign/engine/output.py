"""The folder of a run: claimed before anything is loaded, and what a disk that refuses does to a run."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffalign.engine.checkpoint import what_stands
from diffalign.processes import process_state

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class DiskRefused(RuntimeError):
    """A file could not be written; the message says why, and how to go on."""


def claim(output_dir: Path, *, resume: bool) -> None:
    """Makes the folder and shows that files can be written there; nothing is done on processes that write nothing.

    Args:
        output_dir: of the run.
        resume: whether a run that it holds is to be gone on with.

    Raises:
        FileExistsError: the folder holds a run, and it is not to be resumed: nothing is overwritten.
        ValueError: no folder can be made there, or no file can be written in it.
    """
    if not process_state().is_main_process:
        return
    if not resume and (output_dir / "metrics.jsonl").exists():
        raise FileExistsError(
            f"{output_dir} already holds a run; go on with resume_from_checkpoint=latest, or choose another output_dir"
        )
    proof = output_dir / ".written"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        proof.write_bytes(b"x")
        proof.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written ({error.strerror}); choose another") from error


@contextmanager
def refusals_explained(output_dir: Path) -> Iterator[None]:
    """Turns a full or failing disk inside the block into `DiskRefused`, with the way to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has no number, only the system's in its text.
        numbers = [error.errno] if isinstance(error, OSError) else map(int, re.findall(r"os error (\d+)", str(error)))
        if REFUSALS.isdisjoint(numbers):
            raise
        raise DiskRefused(
            f"a file could not be written in {output_dir} ({error}); {what_stands(output_dir / 'checkpoints')}"
        ) from error
