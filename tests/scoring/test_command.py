"""`diffalign score`: exit statuses, what it prints, and processes that share the work."""

from pathlib import Path

import pytest

from diffalign.scoring import parts, score
from tests.processes import start
from tests.scoring.pictures import Red, folder_of, rows
from tests.test_cli import diffalign_command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere", "--reward", "shapes-clip"), "nowhere does not exist"),
        (("in", "--reward", "shapes-clop"), "did you mean 'shapes-clip'"),
        (("in", "--reward", "shapes-clip", "--shard", "3"), "--shard 3: give the number"),
        (("in", "--reward", "shapes-clip", "--shard", "2/2"), "0/2 to 1/2"),
        (("in", "--reward", "shapes-clip", "--batch-size", "many"), "--batch-size many: give auto"),
    ],
)
def test_wrong_input_ends_with_status_2_before_torch_is_loaded(tmp_path, arguments, told):
    folder_of(tmp_path / "in", 1)
    done = diffalign_command(tmp_path, "score", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "LOADED []" in done.stdout


def test_help_has_an_example(tmp_path):
    done = diffalign_command(tmp_path, "score", "--help")
    assert "diffalign score samples" in done.stdout
    assert "LOADED []" in done.stdout


def test_the_summary_and_the_status(tmp_path, monkeypatch, capsys):
    from diffalign import rewards
    from diffalign.cli import score as command

    monkeypatch.setattr(rewards, "load", lambda name: Red())
    folder = folder_of(tmp_path / "in", 3)
    (folder / "002.png").write_bytes(b"")
    options = {"prompts": None, "prompt_column": None, "batch_size": "auto", "shard": "0/1", "cache": None}
    one = {"rewards": ["shapes-clip"], "out": tmp_path / "out.csv", "keep": 0.5, "per": "prompt"}
    command.run([folder], **one, **options)
    told = capsys.readouterr().out
    assert "red: 1 x " in told
    assert f"kept: {tmp_path / 'out.kept.csv'}" in told
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        command.run([tmp_path / "broken"], **(one | {"out": tmp_path / "none.csv"}), **options)
    assert ended.value.code == 1
    assert len(rows(tmp_path / "none.csv")) == 1
    command.run([folder], **(one | {"out": tmp_path / "part.csv"}), **(options | {"shard": "1/2"}))
    assert "parts of" in capsys.readouterr().out


RANKS = """
import sys
from diffalign.scoring import parts, score
from tests.scoring.pictures import Red
parts.ROWS = 4
reward = Red()
result = score(sys.argv[1], [reward], sys.argv[2], progress=False)
print(sum(reward._seen), bool(result.summaries), file=sys.stderr)
"""


@pytest.mark.slow
def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "ranks.py").write_text(RANKS)
    folder = folder_of(tmp_path / "in", 10)
    ended = start(tmp_path / "ranks.py", [folder, tmp_path / "two.parquet"], 2)
    assert [status for status, _ in ended] == [0, 0], ended
    assert [errors.splitlines()[-1] for _, errors in ended] == ["6 True", "4 False"]
    monkeypatch.setattr(parts, "ROWS", 4)
    whole = score(folder, [Red()], tmp_path / "one.parquet", progress=False).out
    assert whole.read_bytes() == (tmp_path / "two.parquet").read_bytes()
