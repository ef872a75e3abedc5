"""Rewards that compare the samples of a prompt: groups stay whole, whatever the order, the parts and the shards."""

import numpy as np
import pytest
import torch

from diffalign.rewards import ParetoRank
from diffalign.scoring import groups, parts, score
from tests.scoring.pictures import Red, picture, red, rows


class Beats(Red):
    """Share of the other images of its prompt that are less red, as one call sees them."""

    needs = ("prompt",)
    groupwise = True

    def __init__(self, name="beats"):
        super().__init__(name)
        self._groups = []

    def values(self, images, prompts, metadata):
        if "raise" in prompts:
            raise RuntimeError("the judge is gone")
        self._groups.append(len(prompts))
        assert len(set(prompts)) == 1
        value = super().values(images, prompts, metadata)
        return (value[:, None] > value).float().sum(1) / max(1, len(value) - 1)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "ROWS", 4)


def folder_with(path, prompts, **options):
    """Pictures 0, 1, ... with these prompts; None: without."""
    path.mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        picture(number, **options).save(path / f"{number:03d}.png")
        if prompt:
            (path / f"{number:03d}.txt").write_text(prompt)
    return path


def shares(numbers):
    """What Beats says of these pictures, which are a group."""
    reds = np.array([red(number) for number in numbers])
    return dict(zip(numbers, (reds[:, None] > reds).sum(1) / (len(reds) - 1), strict=True))


def run(folder, out, *rewards, **options):
    result = score(folder, list(rewards), out, progress=False, **options)
    return rows(result.out)


def test_a_group_is_one_call_whatever_the_order_and_the_parts(tmp_path, small_parts):
    """18 images of 5 prompts that alternate, parts of 4 rows: groups of 4, 4, 4, 3 and 3."""
    folder = folder_with(tmp_path / "in", [f"p{number % 5}" for number in range(18)])
    judge, alone = Beats(), Red()
    found = run(folder, tmp_path / "out.parquet", judge, alone, ParetoRank([Red("a"), Red("b")], name="rank"))
    assert judge._groups == [4, 4, 4, 3, 3]
    assert max(alone._seen) == 4
    for prompt in range(5):
        for number, share in shares(range(prompt, 18, 5)).items():
            assert found[number]["beats"] == pytest.approx(share)
            assert found[number]["rank"] == pytest.approx(share)
            assert found[number]["red"] == pytest.approx(red(number), abs=1e-6)
    assert [row["path"][-7:-4] for row in found] == [f"{number:03d}" for number in range(18)]


def test_a_prompt_with_more_samples_than_a_part_stays_whole(tmp_path, small_parts):
    folder = folder_with(tmp_path / "in", ["few", "many"] + ["many"] * 9 + ["few"])
    judge = Beats()
    found = run(folder, tmp_path / "out.parquet", judge)
    assert judge._groups == [2, 10]
    assert [row["beats"] for row in found[1:11]] == pytest.approx(list(shares(range(1, 11)).values()))


def test_shards_and_an_interrupted_run_are_the_whole(tmp_path, small_parts):
    folder = folder_with(tmp_path / "in", [f"p{number % 6}" for number in range(20)])
    score(folder, [Beats(), Red()], tmp_path / "whole.parquet", progress=False)
    for shard in (2, 0, 1):
        score(folder, [Beats(), Red()], tmp_path / "out.parquet", shard=(shard, 3), progress=False)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    class Dies(Beats):
        def values(self, *arguments):
            if len(self._groups) == 4:
                raise KeyboardInterrupt
            return super().values(*arguments)

    dies, Dies.__name__, Dies.__qualname__ = Dies(), "Beats", "Beats"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffalign.scoring.run.fingerprint", lambda reward, source: reward.name)
        with pytest.raises(KeyboardInterrupt):
            score(folder, [dies, Red()], tmp_path / "again.parquet", progress=False)
        judge = Beats()
        score(folder, [judge, Red()], tmp_path / "again.parquet", progress=False)
    assert sum(judge._groups) + 4 * 4 - 2 == 20  # two groups of four, two of three: none of them twice
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_every_row_of_hostile_groups_has_a_score_or_a_reason(tmp_path, monkeypatch, small_parts):
    monkeypatch.setattr(groups, "MAX_GROUP", 6)
    prompts = ["good"] * 4 + ["sizes"] * 3 + ["alone"] + [None] * 2 + ["raise"] * 2 + ["crowd"] * 7
    folder = folder_with(tmp_path / "in", prompts)
    (folder / "003.png").write_bytes(b"broken")  # leaves its group, which is compared without it
    picture(5, size=(9, 9)).save(folder / "005.png")
    found = run(folder, tmp_path / "out.parquet", Beats(), Red())
    told = [row["beats_reason"] for row in found]
    assert [row["beats"] for row in found[:3]] == pytest.approx(list(shares(range(3)).values()))
    assert "is not a PNG" in told[3]
    assert told[4:7] == ["the samples of its prompt have 2 sizes, and only those of one size are compared"] * 3
    assert found[7]["beats"] == 0
    assert told[8:10] == ["no prompt, and this reward compares the samples of a prompt"] * 2
    assert told[10:12] == ["RuntimeError: the judge is gone"] * 2
    assert told[12:] == ["its prompt has more samples than are compared with each other: at most 6, of 512 MiB"] * 7
    assert [row["red"] is None for row in found] == [number == 3 for number in range(19)]


def test_a_group_whose_pixels_are_too_many_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "MAX_GROUP_BYTES", 3 * 6 * 8 * 3)
    folder = folder_with(tmp_path / "in", ["three"] * 3 + ["four"] * 4)
    held, add = [], groups.Groups.add

    def adding(self, sample):
        add(self, sample)
        held.append(sum(each.pixels.nbytes for each in self._samples) // (6 * 8 * 3))

    monkeypatch.setattr(groups.Groups, "add", adding)
    found = run(folder, tmp_path / "out.jsonl", Beats())
    assert held == [1, 2, 3, 1, 2, 3, 0]
    assert [row["beats"] is None for row in found] == [False] * 3 + [True] * 4


def test_a_score_is_known_while_its_whole_group_is_the_same(tmp_path):
    folder, cache = folder_with(tmp_path / "in", ["a", "b", "a", "b", "a"]), tmp_path / "cache"
    first = run(folder, tmp_path / "first.csv", Beats(), cache=cache)

    moved = tmp_path / "moved"  # the same contents under other names, in another order
    moved.mkdir()
    for place, number in enumerate((4, 1, 0, 3, 2)):
        (folder / f"{number:03d}.png").rename(moved / f"{place}.png")
        (folder / f"{number:03d}.txt").rename(moved / f"{place}.txt")
    judge = Beats()
    result = score(moved, [judge], tmp_path / "second.csv", cache=cache, progress=False)
    assert (judge._groups, result.hits) == ([], {"beats": 5})
    assert [row["beats"] for row in rows(result.out)] == [first[number]["beats"] for number in (4, 1, 0, 3, 2)]

    picture(99).save(moved / "2.png")  # of "a"
    score(moved, [judge], tmp_path / "third.csv", cache=cache, progress=False)
    assert judge._groups == [3]
    (moved / "1.png").unlink()  # of "b", one of two
    found = run(moved, tmp_path / "fourth.csv", judge, cache=cache)
    assert judge._groups == [3, 1]
    assert float(found[2]["beats"]) == 0


def test_a_group_with_a_failure_is_compared_again_as_a_whole(tmp_path):
    """Scores beside a failure that may pass, such as a server's, are not mixed with those of a later call."""

    class Loses(Beats):
        def values(self, images, prompts, metadata):
            value = Beats.values(self, images, prompts, metadata)
            return value if len(self._groups) > 1 else (value / 2).index_fill(0, torch.tensor([0]), float("nan"))

    folder, judge, cache = folder_with(tmp_path / "in", ["a"] * 3), Loses(), tmp_path / "cache"
    first = run(folder, tmp_path / "first.csv", judge, cache=cache)
    assert sorted(row["beats_reason"] for row in first) == ["", "", "the score is nan"]
    second = run(folder, tmp_path / "second.csv", judge, cache=cache)
    assert judge._groups == [3, 3]
    assert [float(row["beats"]) for row in second] == pytest.approx(list(shares(range(3)).values()))
    assert run(folder, tmp_path / "third.csv", judge, cache=cache) == second
    assert judge._groups == [3, 3]


def test_equal_samples_of_a_group_have_equal_scores(tmp_path):
    folder = folder_with(tmp_path / "in", ["a"] * 3)
    picture(1).save(folder / "002.png")
    first, *equal = run(folder, tmp_path / "out.jsonl", Beats())
    assert equal[0]["beats"] == equal[1]["beats"] == (0 if red(1) < red(0) else 0.5)
    assert first["beats"] == (1 if red(1) < red(0) else 0)
