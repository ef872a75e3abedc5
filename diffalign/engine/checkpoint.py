"""Checkpoints that are whole or are not there: written beside, synced, sealed by a manifest, renamed into place.

A checkpoint is a folder `step-NNNNNN` with the files of `state.save_tree` and, written last, a `manifest.json` with
the size and sha256 of each. The manifest is what makes it valid; a crash between any two file operations leaves a
valid latest checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from diffalign.engine.state import Tree, load_tree, save_tree
from diffalign.versions import versions

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"\.?step-(\d+)(\..*)?")  # with a dot in front while it is written or replaced


class BrokenCheckpoint(ValueError):
    """A checkpoint that was asked for is missing, incomplete or altered; the message says which file and why."""


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be written; the message says why, and which earlier one stands."""


def save_checkpoint(root: str | Path, step: int, tree: Tree, total_limit: int | None = None) -> Path:
    """Writes `root/step-NNNNNN` and removes what it supersedes. Call it on one process only.

    Older checkpoints beyond `total_limit` are removed once the new one is in place. So are those of later steps,
    which a run leaves behind that went on from an earlier one.

    Raises:
        CheckpointNotSaved: the disk is full or refuses; earlier checkpoints are untouched.
    """
    root = Path(root)
    target = root / f"step-{step:06d}"
    temporary = _free_name(target)
    try:
        root.mkdir(parents=True, exist_ok=True)
        save_tree(temporary, tree)
        _seal(temporary, step)
        if target.exists():
            # Folders cannot be swapped in one operation; the old one stays valid under its hidden name until the end.
            target.rename(_free_name(target))
        temporary.rename(target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        if temporary.exists():
            _remove(temporary)
        raise CheckpointNotSaved(
            f"the checkpoint of step {step} could not be written to {root} ({error}); {what_stands(root)}"
        ) from error
    _prune(root, target, total_limit)
    return target


def load_checkpoint(root: str | Path, which: str | Path = "latest") -> tuple[int, Tree] | None:
    """Reads a checkpoint.

    Args:
        root: the folder with the checkpoints of a run.
        which: "latest", the newest under `root` that verifies (those skipped are named in a warning), or the folder
            of one.

    Returns:
        (step, tree), or None when "latest" finds no checkpoint at all.

    Raises:
        BrokenCheckpoint: the folder asked for does not verify, or there are checkpoints and none does.
    """
    if which != "latest":
        reason = defect(Path(which))
        if reason is not None:
            raise BrokenCheckpoint(f"checkpoint {which} {reason}; choose another, or resume_from_checkpoint=latest")
        return _load(Path(which))
    skipped = []
    for path in _newest_first(Path(root)):
        reason = defect(path)
        if reason is None:
            if skipped:
                logger.warning("resuming from %s; skipped %s", path, "; ".join(skipped))
            return _load(_in_place(path))
        skipped.append(f"{path.name}, which {reason}")
    # A hidden folder without a manifest is a first save that was cut off: nothing was ever there to resume.
    visible = [told for told in skipped if not told.startswith(".")]
    if visible:
        raise BrokenCheckpoint(
            f"no checkpoint in {root} is valid: {'; '.join(visible)}. Start again in another output_dir"
        )
    return None


def what_stands(root: Path) -> str:
    """After a disk has refused: the newest checkpoint under `root` that verifies, and how to go on from it."""
    valid = next((path for path in _newest_first(root) if defect(path) is None), None)
    stands = f"{valid.name} is kept and valid" if valid else "there is no checkpoint yet"
    return f"{stands}. Free some space, then go on with resume_from_checkpoint=latest"


def defect(path: Path, *, contents: bool = True) -> str | None:
    """Why the checkpoint in `path` is not valid, in words that follow its name, or None when every file verifies.

    Without `contents` only names and sizes are compared, which costs nothing.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if Path(name).name != name:
                return f"lists a file outside of it, {name}"
            file = path / name
            if file.stat().st_size != expected["size"]:
                return f"is damaged: {name} has {file.stat().st_size} bytes instead of {expected['size']}"
            if contents and _sha256(file) != expected["sha256"]:
                return f"is damaged: the content of {name} has changed"
    except FileNotFoundError as error:
        return "does not exist" if not path.is_dir() else f"is incomplete: {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    return None


def _seal(folder: Path, step: int) -> None:
    """Syncs every file of the folder, then writes and syncs the manifest."""
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {"step": step, "versions": versions(), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _load(path: Path) -> tuple[int, Tree]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"], load_tree(path)


def _in_place(path: Path) -> Path:
    """Ends a save that was cut off between its seal and its rename; what cannot be written is read where it is."""
    if not _is_hidden(path):
        return path
    target = path.with_name(f"step-{_step(path):06d}")
    try:
        if target.exists():
            _remove(target)  # it is damaged, or it would have been read first
        path.rename(target)
        _sync(target.parent)
    except OSError as error:
        logger.warning("reading %s where it is: %s", path, error)
        return path
    return target


def _free_name(target: Path) -> Path:
    """A hidden sibling that does not exist: what a crash left may be the only valid copy, and is removed last."""
    names = (target.with_name(f".{target.name}.{number}") for number in itertools.count())
    return next(path for path in names if not path.exists())


def _step(folder: Path) -> int:
    """The step that the name of a checkpoint folder says, -1 if it is not the name of one."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _is_hidden(folder: Path) -> bool:
    return folder.name.startswith(".")


def _newest_first(root: Path) -> list[Path]:
    """Checkpoint folders by step; hidden ones, left by a crash, after the one in place."""
    found = [path for path in root.glob("*step-*") if _step(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), not _is_hidden(path)), reverse=True)


def _prune(root: Path, saved: Path, total_limit: int | None) -> None:
    others = [path for path in _newest_first(root) if path != saved]
    later = [path for path in others if _step(path) > _step(saved)]
    kept = [path for path in others if _step(path) < _step(saved) and not _is_hidden(path)]
    if total_limit is not None:
        # A damaged one does not count, so that what is kept can be resumed from.
        kept = [path for path in kept if defect(path, contents=False) is None][: total_limit - 1]
    for path in later:
        logger.warning("removing %s: the run went on from an earlier step", path)
    for path in others:
        try:
            if path not in kept:
                _remove(path)
        except OSError as error:
            logger.warning("%s could not be removed (%s); remove it by hand", path, error)


def _remove(folder: Path) -> None:
    """Removes a checkpoint folder, manifest first: half removed it must not pass for whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
