"""Tensors on disk: what is put is got to the bit, what is damaged is told, and a folder is bounded and shared."""

import logging
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign.data import TensorCache, cache

KEY, OTHER = "ab" * 32, "cd" * 32


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 4, generator=generator)
    found = {"a": normal, "b": normal.bfloat16().T, "c": torch.tensor(7), "d": torch.zeros(0, 2), "e": normal > 0}
    return found | {"f": normal.double()[1:]}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_put_is_got_to_the_bit_by_everyone(tmp_path):
    mine = TensorCache(tmp_path / "deep" / "cache")
    assert mine.get(KEY) is None
    assert mine.put(KEY, tensors())
    assert same(TensorCache(tmp_path / "deep" / "cache").get(KEY), tensors())
    assert mine.get(OTHER) is None
    assert mine.put(KEY, tensors(1)), "the later one stands"
    assert same(mine.get(KEY), tensors(1))
    assert [path.suffix for path in (tmp_path / "deep").rglob("*.*")] == [".safetensors"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def unsigned(path):
    save_file({"a": tensors()["a"]}, path)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, unsigned])
def test_what_is_damaged_is_told_and_can_be_put_again(tmp_path, caplog, damage):
    found = TensorCache(tmp_path)
    found.put(KEY, tensors())
    (path,) = tmp_path.rglob("*.safetensors")
    damage(path)
    assert found.get(KEY) is None
    (told,) = warnings_of(caplog)
    assert told.startswith(f"{path} is damaged (")
    assert told.endswith(") and is computed again")
    assert found.put(KEY, tensors())
    assert same(found.get(KEY), tensors())


def test_a_full_folder_takes_no_more_and_says_so_once(tmp_path, caplog):
    first = TensorCache(tmp_path, max_bytes=20_000)
    row = {"x": torch.zeros(1000)}  # some 4,100 bytes
    assert [first.put(f"{i:064x}", row) for i in range(7)] == [True] * 4 + [False] * 3
    (told,) = warnings_of(caplog)
    assert told == (
        f"the cache {tmp_path} holds 20,000 bytes, the most that are kept; remove it to start it anew: "
        "what is new stays in main memory"
    )
    assert first.get(f"{3:064x}") is not None, "it is read on"
    assert not TensorCache(tmp_path, max_bytes=20_000).put(KEY, row), "what is there counts"
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= 20_000


def test_two_that_write_share_the_bound(tmp_path):
    both = [TensorCache(tmp_path, max_bytes=200_000) for _ in range(2)]
    row = {"x": torch.zeros(1000)}
    for i in range(200):
        both[i % 2].put(f"{i:064x}", row)
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    assert 170_000 < held <= 200_000 + 2 * 200_000 // 16


def test_some_of_the_disk_stays_free(tmp_path, caplog, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - cache.KEEP_FREE, cache.KEEP_FREE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert not TensorCache(tmp_path).put(KEY, tensors())
    assert "is on a disk with fewer than 2,147,483,648 free bytes" in warnings_of(caplog)[0]


def test_a_disk_that_refuses_stops_nothing(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    found = TensorCache(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert not found.put(KEY, tensors())
    assert not found.put(OTHER, tensors())
    (told,) = warnings_of(caplog)
    assert "cannot be written to ([Errno 28] No space left on device)" in told
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_is_removed_is_made_again(tmp_path, caplog):
    found = TensorCache(tmp_path / "cache")
    assert found.put(KEY, tensors())
    shutil.rmtree(tmp_path / "cache")
    assert found.get(KEY) is None
    assert found.put(KEY, tensors())
    assert same(found.get(KEY), tensors())
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    assert not found.put(KEY, tensors())
    assert len(warnings_of(caplog)) == 1


def test_a_file_that_cannot_be_written_costs_itself_alone(tmp_path, caplog):
    found = TensorCache(tmp_path)
    (tmp_path / KEY[:2]).write_text("")
    assert not found.put(KEY, tensors())
    assert not found.put(KEY, tensors())
    (told,) = warnings_of(caplog)
    assert told.startswith(f"{tmp_path / KEY[:2] / KEY}.safetensors cannot be written (")
    assert found.put(OTHER, tensors())
    assert same(found.get(OTHER), tensors())


def test_tensors_that_share_memory_are_kept(tmp_path):
    x = torch.arange(6.0)
    shared = {"a": x, "b": x, "c": x[2:], "d": x.view(2, 3)}
    assert TensorCache(tmp_path).put(KEY, shared)
    assert same(TensorCache(tmp_path).get(KEY), shared)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache = .*file is no folder; name another"):
        TensorCache(tmp_path / "file")


def test_several_write_and_read_at_once(tmp_path, caplog):
    """The same keys and the same content, each writer with a cache of its own, as processes have."""
    expected = [tensors(i) for i in range(8)]

    def work(_):
        own, misses = TensorCache(tmp_path), 0
        for i in [*range(8)] * 5:
            found = own.get(f"{i:064x}")
            misses += found is None
            assert found is None or same(found, expected[i])
            own.put(f"{i:064x}", expected[i])
        return misses

    with ThreadPoolExecutor(4) as pool:
        misses = list(pool.map(work, range(4)))
    assert max(misses) <= 8
    assert not warnings_of(caplog), "nothing is seen half written"
    assert len(list(tmp_path.rglob("*.*"))) == 8
