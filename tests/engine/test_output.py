"""The folder of a run: refused in a sentence before anything is loaded, and a full disk explained."""

import errno
import os
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from diffalign.engine import output
from diffalign.engine.checkpoint import save_checkpoint
from diffalign.engine.output import DiskRefused, claim, refusals_explained


def test_a_new_folder_is_made_and_left_empty(tmp_path):
    claim(tmp_path / "runs" / "new", resume=False)
    assert list((tmp_path / "runs" / "new").iterdir()) == []


def test_a_run_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="already holds a run; go on with resume_from_checkpoint=latest"):
        claim(tmp_path, resume=False)
    # The metrics of the first process are no run of another: ranks start at different times.
    monkeypatch.setattr(output, "process_state", lambda: SimpleNamespace(is_main_process=False))
    claim(tmp_path, resume=False)


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"output_dir .*file/run cannot be written \(Not a directory\); choose another"
    ):
        claim(tmp_path / "file" / "run", resume=False)


def test_a_read_only_folder_is_told(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # root may write anywhere
        monkeypatch.setattr("pathlib.Path.write_bytes", _refuse(errno.EROFS))
    with pytest.raises(ValueError, match=r"cannot be written \((Read-only file system|Permission denied)\)"):
        claim(tmp_path, resume=False)


def _refuse(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples/validation-000020.png"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_checkpoint_that_stands(tmp_path, error):
    with (
        pytest.raises(DiskRefused, match=r"No space left .*; there is no checkpoint yet\. Free"),
        refusals_explained(tmp_path),
    ):
        raise error
    save_checkpoint(tmp_path / "checkpoints", 20, {"step": 20})
    with (
        pytest.raises(DiskRefused, match=r"step-000020 is kept and valid\. Free .*latest"),
        refusals_explained(tmp_path),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no such file"), SafetensorError("header too large")])
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, refusals_explained(tmp_path):
        raise error
    assert caught.value is error
