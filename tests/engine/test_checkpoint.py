"""Checkpoints: a crash between any two file operations, damage, a full disk."""

import errno
import json
import logging
import os
import shutil
import stat

import pytest
import torch

from diffalign.engine import checkpoint
from diffalign.engine.checkpoint import BrokenCheckpoint, CheckpointNotSaved, load_checkpoint, save_checkpoint


def tree(step):
    return {"step": step, "weights": {"a": torch.full((3, 2), float(step)), "b": torch.arange(step + 1)}, "rate": 0.1}


def assert_is(found, step):
    assert found is not None
    assert found[0] == step
    assert found[1]["step"] == step
    assert torch.equal(found[1]["weights"]["a"], tree(step)["weights"]["a"])
    assert torch.equal(found[1]["weights"]["b"], tree(step)["weights"]["b"])


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_save_and_load(tmp_path):
    assert load_checkpoint(tmp_path / "none", "latest") is None
    path = save_checkpoint(tmp_path, 7, tree(7))
    assert path == tmp_path / "step-000007"
    assert_is(load_checkpoint(tmp_path), 7)
    assert_is(load_checkpoint(tmp_path / "elsewhere", path), 7)
    assert names(tmp_path) == ["step-000007"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["versions"]["torch"]
    assert set(manifest["files"]) == {"state.json", "tensors.safetensors"}


def test_older_ones_go_and_the_new_one_stays(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tree(step), total_limit=2)
    assert names(tmp_path) == ["step-000020", "step-000030"]


def test_steps_are_ordered_as_numbers(tmp_path):
    save_checkpoint(tmp_path, 999_999, tree(1))
    save_checkpoint(tmp_path, 1_000_000, tree(2), total_limit=1)
    assert names(tmp_path) == ["step-1000000"]


def test_a_damaged_one_does_not_count_for_the_limit(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tree(step))
    (tmp_path / "step-000020" / "tensors.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 30, tree(30), total_limit=2)
    assert names(tmp_path) == ["step-000010", "step-000030"]


def test_a_run_that_went_back_leaves_its_later_steps(tmp_path, caplog):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tree(step))
    with caplog.at_level(logging.WARNING):
        save_checkpoint(tmp_path, 15, tree(15))
    assert "step-000020" in caplog.text
    assert_is(load_checkpoint(tmp_path), 15)


def test_the_same_step_again_replaces(tmp_path):
    save_checkpoint(tmp_path, 5, tree(4))
    save_checkpoint(tmp_path, 5, tree(5))
    assert_is(load_checkpoint(tmp_path), 5)
    assert names(tmp_path) == ["step-000005"]


class Crash(BaseException):
    """As SIGKILL, no handler of an exception runs for it."""


class Machine:
    """Counts the file operations that checkpoints are made of, and ends in the middle of them when told to.

    After the crash, files that were never synced are empty, as a power cut may leave them.
    """

    OPERATIONS = ("open", "fsync", "rename", "unlink", "rmdir", "mkdir")

    def __init__(self, monkeypatch):
        self.count, self.crash_at, self.synced = 0, None, set()
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        monkeypatch.setattr(checkpoint, "save_tree", self.counted("save_tree", checkpoint.save_tree, after=True))

    def counted(self, name, operation, after=False):
        def call(*args, **kwargs):
            self.tick()
            result = operation(*args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
            if after:
                self.tick()
            return result

        return call

    def tick(self):
        self.count += 1
        if self.count == self.crash_at:
            raise Crash

    def lose_what_was_not_synced(self, root):
        self.crash_at = None
        for folder, _, files in os.walk(root):
            for file in files:
                path = os.path.join(folder, file)
                info = os.stat(path)
                if stat.S_ISREG(info.st_mode) and info.st_ino not in self.synced:
                    os.truncate(path, 0)


def crashes(tmp_path, monkeypatch, earlier, saved, total_limit):
    """The latest checkpoint after a crash before each operation of a save in turn."""
    found, crash_at = [], 1
    while True:
        root = tmp_path / f"run-{crash_at}"
        with monkeypatch.context() as patch:
            machine = Machine(patch)
            for step in earlier:
                save_checkpoint(root, step, tree(step))
            machine.crash_at = machine.count + crash_at
            try:
                save_checkpoint(root, saved, tree(saved), total_limit=total_limit)
            except Crash:
                pass
            else:
                return found
            machine.lose_what_was_not_synced(root)
        found.append((root, load_checkpoint(root)))
        crash_at += 1


@pytest.mark.parametrize(("earlier", "saved", "total_limit"), [((10,), 20, 1), ((10, 20), 30, 2), ((10,), 10, 1)])
def test_a_crash_between_any_two_operations_leaves_a_valid_latest(tmp_path, monkeypatch, earlier, saved, total_limit):
    outcomes = crashes(tmp_path, monkeypatch, earlier, saved, total_limit)
    assert len(outcomes) > 10
    for root, latest in outcomes:
        assert latest is not None, f"no valid checkpoint in {root}"
        assert_is(latest, latest[0])
        assert latest[0] in (max(earlier), saved)
        # The run goes on from there, and its next save removes what the crash left.
        save_checkpoint(root, 40, tree(40), total_limit=1)
        assert names(root) == ["step-000040"]
    steps = [latest[0] for _, latest in outcomes]
    assert steps == sorted(steps), "once the new checkpoint is valid it stays so"
    assert steps[-1] == saved


def test_a_crash_in_the_first_save_of_a_run_starts_it_anew(tmp_path, monkeypatch):
    outcomes = [latest for _, latest in crashes(tmp_path, monkeypatch, (), 10, None)]
    assert outcomes[0] is None
    assert_is(outcomes[-1], 10)


def test_the_newest_that_verifies_is_taken_and_the_others_named(tmp_path, caplog):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, tree(step))
    (tmp_path / "step-000040" / "manifest.json").unlink()
    damaged = tmp_path / "step-000030" / "tensors.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert_is(load_checkpoint(tmp_path), 20)
    assert "step-000040, which is incomplete: manifest.json is missing" in caplog.text
    assert "step-000030, which is damaged: the content of tensors.safetensors has changed" in caplog.text


def test_a_broken_one_that_was_asked_for_is_an_error(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tree(step))
    with (tmp_path / "step-000020" / "state.json").open("a") as file:
        file.write(" ")
    with pytest.raises(
        BrokenCheckpoint, match=r"step-000020 is damaged: state\.json has \d+ bytes instead of \d+; choose"
    ):
        load_checkpoint(tmp_path, tmp_path / "step-000020")
    with pytest.raises(BrokenCheckpoint, match="does not exist"):
        load_checkpoint(tmp_path, tmp_path / "step-000099")


def test_none_valid_is_an_error_and_no_silent_start(tmp_path):
    save_checkpoint(tmp_path, 10, tree(10))
    (tmp_path / "step-000010" / "manifest.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match="step-000010, which cannot be read"):
        load_checkpoint(tmp_path)


def test_a_manifest_cannot_name_files_outside(tmp_path):
    path = save_checkpoint(tmp_path, 10, tree(10))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="outside"):
        load_checkpoint(tmp_path, path)


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_full_disk_keeps_the_earlier_one_and_says_so(tmp_path, monkeypatch, operation):
    save_checkpoint(tmp_path, 10, tree(10), total_limit=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(CheckpointNotSaved, match=r"step 20 .*No space left.*step-000010 is kept and valid. Free"):
            save_checkpoint(tmp_path, 20, tree(20), total_limit=1)
    assert names(tmp_path) == ["step-000010"]
    assert_is(load_checkpoint(tmp_path), 10)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_while_writing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 10, tree(10))
    monkeypatch.setattr(checkpoint, "save_tree", lambda folder, _: _write_to_full_disk(folder))
    with pytest.raises(CheckpointNotSaved, match="step-000010 is kept and valid"):
        save_checkpoint(tmp_path, 20, tree(20))
    assert names(tmp_path) == ["step-000010"]


def _write_to_full_disk(folder):
    folder.mkdir()
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    save_checkpoint(tmp_path, 10, tree(10))

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        save_checkpoint(tmp_path, 20, tree(20), total_limit=1)
    assert "could not be removed" in caplog.text
    assert_is(load_checkpoint(tmp_path), 20)
