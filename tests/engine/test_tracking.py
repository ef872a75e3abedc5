"""metrics.jsonl and trackers."""

import errno
import json
import logging
import math
import os

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffalign.engine.tracking import Metrics, read_metrics


def write(folder, steps, **kwargs):
    metrics = Metrics(folder, **kwargs)
    for step in steps:
        metrics.append({"step": step, "reward": step / 10})
    metrics.close()


def test_rows_are_there_at_once(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.append({"step": 1, "reward": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]
    metrics.close()


def test_resume_drops_the_steps_that_are_done_again(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, range(4, 8), resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(8))


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, range(4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    write(tmp_path, [4], resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(5))


def test_a_new_start_keeps_nothing(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [0], resume_step=0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_become_null(tmp_path, value):
    metrics = Metrics(tmp_path)
    metrics.append({"step": 1, "reward": value})
    metrics.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "reward": None}


def test_tensorboard_has_the_same_numbers_and_no_doubles_after_resume(tmp_path):
    write(tmp_path, range(1, 6), report_to=["tensorboard"], accelerator=Accelerator())
    write(tmp_path, range(4, 7), report_to=["tensorboard"], accelerator=Accelerator(), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "diffalign")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(step, pytest.approx(step / 10)) for step in range(1, 7)]


class Server(GeneralTracker):
    """A tracker whose server is gone after a while."""

    name = "server"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, lives):
        super().__init__()
        self.lives, self.steps = lives, []

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        if len(self.steps) == self.lives:
            raise ConnectionError("no route to host")
        self.steps.append(step)

    def finish(self):
        raise ConnectionError("no route to host")


def test_a_tracker_that_dies_is_left_out_and_the_run_goes_on(tmp_path, caplog):
    accelerator, server = Accelerator(), Server(lives=2)
    metrics = Metrics(tmp_path, report_to=["tensorboard"], accelerator=accelerator)
    accelerator.trackers.insert(0, server)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            metrics.append({"step": step, "reward": 0.5})
        metrics.close()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("tracker server failed (ConnectionError: no route to host) and is left out")
    assert server.steps == [1, 2]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "diffalign")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_does_not_start_is_told_before_training(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not logged in")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(
        ValueError, match=r"report_to \['tensorboard'\]: .*PermissionError: not logged in.*leave it out"
    ):
        Metrics(tmp_path, report_to=["tensorboard"])


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    metrics.append({"step": 1, "reward": 0.5})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            metrics.append({"step": 2, "reward": 0.5})
    write(tmp_path, [2], resume_step=1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
