"""metrics.jsonl and trackers."""

import json
import math

import pytest
from accelerate import Accelerator
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
