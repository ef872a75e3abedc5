"""A disk that fills up at any moment of a run ends it with a sentence, and loses nothing that was saved."""

import os
import subprocess
import sys

import pytest

from diffalign.engine.checkpoint import load_checkpoint
from tests.end_to_end.test_resume import RECIPE, assert_bit_equal

PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    """A file system of its own in memory, and a function that sets its size in bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True, text=True
        )

    done = mount("size=64m")
    if done.returncode:
        pytest.skip(f"a tmpfs takes the right to mount: {done.stderr.strip()}")
    yield place, lambda size: mount(f"remount,size={size}").check_returncode()
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # lazy: what a failed test still holds open


def train(recipe, out, *settings):
    command = [sys.executable, "-m", "diffalign", "train", str(recipe), f"output_dir={out}", *settings]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def used(place):
    """Bytes that are taken on a file system."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_bsize


@pytest.mark.verify
@pytest.mark.timeout(1200)
def test_a_full_disk_loses_nothing(tmp_path, disk):
    place, resize = disk
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    whole = train(recipe, place / "whole")
    assert whole.returncode == 0, whole.stderr
    room = used(place)
    endings = set()
    for number, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)):
        run = place / str(number)
        run.mkdir()
        resize(used(place) + int(share * room) // PAGE * PAGE)
        stopped = train(recipe, run)
        assert stopped.returncode == 1, stopped.stdout
        assert "Traceback" not in stopped.stderr, stopped.stderr
        assert "resume_from_checkpoint=latest" in stopped.stderr
        found = load_checkpoint(run / "checkpoints")
        endings.add(found and found[0])
        if found:
            assert f"step-{found[0]:06d} is kept and valid" in stopped.stderr, stopped.stderr
        resize("64m")
        resumed = train(recipe, run, "resume_from_checkpoint=latest")
        assert resumed.returncode == 0, resumed.stderr
        assert_bit_equal(run, place / "whole")
    assert {None, 2} <= endings  # before the first checkpoint, and after one
