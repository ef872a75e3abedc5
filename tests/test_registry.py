"""Names to things, and the files that ship with the package."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from diffalign import registry
from diffalign.ledger import Ledger
from diffalign.registry import Registry, UnknownName, data_root, resolve_data


def test_names_are_case_folded_and_unique() -> None:
    table: Registry[type] = Registry("reward")
    table.register("CLIP")(int)
    assert table.get("clip") is int
    assert table.get("Clip") is int
    with pytest.raises(ValueError, match="'clip' is registered twice"):
        table.register("clip")(str)


def test_an_unknown_name_is_answered_with_near_misses() -> None:
    table: Registry[type] = Registry("reward")
    table.register("aesthetic")(int)
    with pytest.raises(UnknownName, match=r"unknown reward 'asthetic': did you mean 'aesthetic'.*known: aesthetic"):
        table.get("asthetic")
    assert issubclass(UnknownName, ValueError)


def test_plugins_are_loaded_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    entries = [
        EntryPoint("Root", "math:sqrt", "diffalign.policies"),
        EntryPoint("broken", "no_such_module:thing", "diffalign.policies"),
    ]

    def fake(group: str) -> list[EntryPoint]:
        asked.append(group)
        return entries

    monkeypatch.setattr(registry, "entry_points", fake)
    table: Registry[object] = Registry("policy")
    assert table.names() == ["broken", "root"]
    assert table.get("root")(9) == 3  # type: ignore[operator]
    assert set(asked) == {"diffalign.policies"}


def test_shipped_names_resolve_and_cannot_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo" / "tiny-sd").mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "shapes-train.txt").write_text("a cube\n")
    monkeypatch.setattr(registry, "data_root", lambda: tmp_path)
    assert resolve_data("zoo:tiny-sd", Path()) == tmp_path / "zoo" / "tiny-sd"
    assert resolve_data("prompts:shapes-train", Path()) == tmp_path / "prompts" / "shapes-train.txt"
    for name in ("zoo:../prompts", "zoo:tiny", "zoo:"):
        with pytest.raises(UnknownName, match="tiny-sd"):
            resolve_data(name, Path())


def test_other_paths_start_at_the_recipe(tmp_path: Path) -> None:
    assert resolve_data("a/b", tmp_path) == tmp_path / "a" / "b"
    assert resolve_data("/x/y", tmp_path) == Path("/x/y")
    assert resolve_data("~/y", tmp_path) == Path.home() / "y"


def test_data_root_is_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "diffalign"
    package.mkdir()
    monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
    assert data_root() == tmp_path / "assets"
    (package / "_data" / "assets").mkdir(parents=True)
    assert data_root() == package / "_data" / "assets"
    assert data_root("rewards") == tmp_path / "rewards"


def test_ledgers_add_counts_and_take_the_largest_memory() -> None:
    first = Ledger(denoiser_evaluations=10, decodes=2, seconds=1.5, peak_memory_bytes=100)
    second = Ledger(denoiser_evaluations=5, reward_calls=3, seconds=0.5, peak_memory_bytes=70)
    total = first + second
    assert total == Ledger(denoiser_evaluations=15, decodes=2, reward_calls=3, seconds=2.0, peak_memory_bytes=100)
    assert first.denoiser_evaluations == 10
    assert total.as_dict()["nfe"] == 15
