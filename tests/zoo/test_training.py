"""The loop resumes to the bit."""

import json

import pytest
import torch

from diffalign.zoo import training


class Stop(Exception):
    pass


def run(folder, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)

    def loss(batch):
        if batch.step == stop_at:
            raise Stop
        x = torch.randn(8, 4, generator=batch.generator) + batch.rng.normal()
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    schedule = training.Schedule(steps=6, learning_rate=0.1, warmup=2, decay=3)
    training.train(model, loss, schedule, folder, seed=3, checkpoint_every=2, log_every=1)
    return model.state_dict()


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path, stop_at):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop_at)
    resumed = run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stop_between_the_renames_loses_nothing(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_at=5)
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / "checkpoint.old")
    resumed = run(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_is_not_repeated(tmp_path):
    first = run(tmp_path)
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    again = run(tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == rows


def test_the_rate_warms_up_stays_and_decays_to_zero():
    schedule = training.Schedule(steps=100, learning_rate=1.0, warmup=10, decay=50)
    assert [schedule.rate(step) for step in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])
