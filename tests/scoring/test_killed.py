"""Killed at any moment and resumed, a run ends as the one that was not; and no file ends a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffalign import media
from tests.scoring.pictures import folder_of, picture, rows

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def python(*arguments, cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def killed_and_resumed(kind, folder, inputs, count):
    done = python(HERE / "killed_scores.py", kind, folder, inputs, count)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    whole, *killed = ({p.name: p.read_bytes() for p in run.glob("out.*") if p.is_file()} for run in
                      [folder / "whole", *sorted(folder.glob("kill-*"))])  # fmt: skip
    assert set(whole) == {"out.parquet", "out.kept.parquet", "out.html"}
    for run in killed:
        assert run == whole
    for run in folder.glob("kill-*"):
        assert not list(run.glob(".out*")), "no half file is left beside the whole ones"
    return len(killed)


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_equal_files(tmp_path):
    inputs = folder_of(tmp_path / "in", 30)
    for number in range(30):
        (inputs / f"{number:03d}.json").write_text(f'{{"weight": {number % 3}}}')
    (inputs / "012.png").write_bytes(b"broken")
    assert killed_and_resumed("small", tmp_path, inputs, 6) == 6


@pytest.mark.slow
def test_a_killed_run_with_groups_and_references_is_resumed_to_equal_files(tmp_path):
    inputs = folder_of(tmp_path / "in", 24, prompts=False)
    for number in range(24):
        picture(number).save(inputs / f"{number:03d}.png")  # of one size
        told = {"prompt": f"p{number % 5}", "reference": f"../subjects/{number % 2}.png"}
        (inputs / f"{number:03d}.json").write_text(json.dumps(told))
    (tmp_path / "subjects").mkdir()
    for number in range(2):
        picture(50 + number).save(tmp_path / "subjects" / f"{number}.png")
    (inputs / "007.png").write_bytes(b"broken")
    (inputs / "012.json").write_text('{"prompt": "p2", "reference": "gone.png"}')
    assert killed_and_resumed("groups", tmp_path, inputs, 3) == 3
    found = rows(tmp_path / "whole" / "out.parquet")
    assert [number for number, row in enumerate(found) if row["rank"] is None] == [7, 12]
    assert len({row["rank"] for row in found}) > 4


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_two_thousand_images_and_four_rewards_killed_three_times(tmp_path):
    from diffalign.zoo.prompts import captions
    from diffalign.zoo.render import render

    scenes, rng = captions("train"), np.random.default_rng(0)
    inputs = tmp_path / "in"
    for start in range(0, 2000, 100):
        some = [scenes[i % len(scenes)] for i in range(start, start + 100)]
        for number, (scene, image) in enumerate(zip(some, render(some, rng), strict=True), start):
            media.save_png(image, inputs / f"{number:05d}.png")
            (inputs / f"{number:05d}.txt").write_text(scene.caption)
    killed_and_resumed("zoo", tmp_path, inputs, 3)
    found = rows(tmp_path / "whole" / "out.parquet")
    assert len(found) == 2000
    assert all(row[name] is not None for row in found for name in ("shapes-clip", "shapes-preference", "shapes-oracle"))


MEMORY = """
import resource, sys, torch
from diffalign.scoring import score
from tests.scoring.pictures import Red
class Film(Red):
    media = "video"
    def values(self, images, prompts, metadata):
        return images.mean((1, 2, 3, 4))
score(sys.argv[1], [Red(), Film("film")][: int(sys.argv[3])], sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def score_hostile(tmp_path, number, rewards):
    from tests.media.hostile import write_corpus

    corpus = write_corpus(tmp_path / "in", number)
    (tmp_path / "score.py").write_text(MEMORY)
    done = python(tmp_path / "score.py", tmp_path / "in", tmp_path / "out.parquet", rewards)
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path / "out.parquet")
    assert len(found) == len(corpus) == number
    for name in ("red", "film")[:rewards]:
        assert all((row[name] is None) != (row[f"{name}_reason"] is None) for row in found)
        assert all(row[f"{name}_reason"] is None or row[f"{name}_reason"].isprintable() for row in found)
        assert any(row[name] is not None for row in found)
    megabytes = int(done.stdout)
    print(f"{megabytes} MiB at most")
    return megabytes


@pytest.mark.slow
def test_every_hostile_file_is_a_row(tmp_path):
    pytest.importorskip("av")
    from tests.media.hostile import KINDS

    score_hostile(tmp_path, len(KINDS), 1)


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_a_thousand_hostile_files_are_a_thousand_rows_in_bounded_memory(tmp_path):
    pytest.importorskip("av")
    assert score_hostile(tmp_path, 1000, 2) < 3000
