"""Batches of one size, what several rewards share of them, and a failure that costs its own score alone."""

import pytest
import torch

from diffalign.scoring import score
from diffalign.scoring.batches import Scorer
from diffalign.scoring.cache import Cache
from diffalign.scoring.items import Item
from tests.scoring.pictures import Red, Words, folder_of, picture, red, rows


def scorer(tmp_path, *rewards, **options):
    fingerprints = {reward.name: reward.name for reward in rewards}
    return Scorer(rewards, fingerprints, Cache(tmp_path / "scores.sqlite"), **options)


def pixels(number, height=6, width=8):
    draw = torch.Generator().manual_seed(number)
    return torch.randint(1, 256, (3, height, width), generator=draw, dtype=torch.uint8)


def decoded(sizes):
    return [(i, Item(f"{i}.png", None, "p"), pixels(i, *size)) for i, size in enumerate(sizes)]


def test_images_of_one_size_share_a_batch(tmp_path):
    reward = Red()
    sizes = [(4, 4), (8, 8)] * 5
    found = scorer(tmp_path, reward, batch_size=3).score(decoded(sizes))
    assert sorted(reward._seen) == [2, 2, 3, 3]
    for index, _, image in decoded(sizes):
        assert found[index]["red"] == pytest.approx(float(image[0].float().mean() / 255), abs=1e-6)


def test_the_batch_is_smaller_where_images_are_larger(tmp_path):
    reward = Red()
    scorer(tmp_path, reward).score(decoded([(2048, 2048)] * 5 + [(4, 4)] * 70))
    assert reward._seen == [4, 64, 1, 6]


class Greedy(Red):
    """Has memory for four images."""

    def values(self, images, prompts, metadata):
        self._seen.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images[:, 0].mean((1, 2))


def test_a_batch_that_does_not_fit_is_halved_and_the_next_starts_there(tmp_path):
    reward = Greedy()
    found = scorer(tmp_path, reward, batch_size=16).score(decoded([(4, 4)] * 32))
    assert reward._seen == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    for index, _, image in decoded([(4, 4)] * 32):
        assert found[index]["red"] == pytest.approx(float(image[0].float().mean() / 255), abs=1e-6)


def test_what_does_not_fit_alone_has_a_reason(tmp_path):
    class Full(Red):
        def values(self, images, prompts, metadata):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    found = scorer(tmp_path, Full()).score(decoded([(4, 4)] * 2))
    assert found[1]["red"] == "OutOfMemoryError: CUDA out of memory."


def test_rewards_of_one_encoder_share_its_pass(tmp_path):
    """The tensor that each reward gets of a batch is the same, and a batch without one of them has another."""
    seen = []

    class Looks(Red):
        def values(self, images, prompts, metadata):
            seen.append(images)
            return super().values(images, prompts, metadata)

    items = decoded([(4, 4)] * 3)
    items[0][1].metadata["weight"] = 1

    class Weighs(Looks):
        needs = ("weight",)

    found = scorer(tmp_path, Looks("a"), Looks("b"), Weighs("c")).score(items)
    assert seen[0] is seen[1]
    assert len(seen[2]) == 1
    assert found[0]["c"] == found[0]["a"]
    assert found[1]["c"] == "no weight in its metadata"


def test_a_failed_score_costs_no_other(tmp_path):
    items = decoded([(4, 4)] * 5)
    items[3][2][:, 0, 0] = 0
    items[1] = (1, items[1][1], "is broken")
    found = scorer(tmp_path, Red("a"), Red("b")).score(items)
    assert found[3] == {"a": "the score is nan", "b": "the score is nan"}
    assert found[1] == {"a": "is broken", "b": "is broken"}
    assert all(isinstance(found[i]["a"], float) for i in (0, 2, 4))


def test_what_a_reward_needs_and_an_item_lacks_is_the_reason(tmp_path):
    class Film(Red):
        media = "video"

        def values(self, images, prompts, metadata):
            return images[:, :, 0].mean((1, 2, 3))

    items = [
        (0, Item("0.png", None, "four", {"weight": 2}), pixels(0)),
        (1, Item("1.png", None, None, {"weight": 2}), pixels(1)),
        (2, Item("2.png", None, "four", {}), pixels(2)),
        (3, Item("3.mp4", None, "four", {"weight": 2}), torch.stack([pixels(3), pixels(4)])),
    ]
    found = scorer(tmp_path, Red(), Words("words"), Film("film")).score(items)
    assert found[0]["words"] == pytest.approx(found[0]["red"] + 6, abs=1e-5)
    assert found[1]["words"] == "no prompt"
    assert found[2]["words"] == "no weight in its metadata"
    assert found[3]["red"] == "is a video, and this reward scores images"
    assert found[0]["film"] == "is an image, and this reward scores videos"
    assert found[3]["film"] == pytest.approx(float(torch.stack([pixels(3), pixels(4)])[:, 0].float().mean() / 255))


def test_no_gradients_are_kept(tmp_path):
    class Graph(Red):
        def values(self, images, prompts, metadata):
            assert not torch.is_grad_enabled()
            return super().values(images.requires_grad_(), prompts, metadata)

    assert isinstance(scorer(tmp_path, Graph()).score(decoded([(4, 4)]))[0]["red"], float)


def test_the_same_content_is_scored_once(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    for copy in ("a", "b"):
        picture(1).save(folder / f"{copy}.png")
        (folder / f"{copy}.txt").write_text({"a": "prompt 1", "b": "another"}[copy])
        (folder / f"{copy}.json").write_text('{"weight": 1, "note": "' + copy + '"}')
    (folder / "001.json").write_text('{"weight": 1}')

    first = [Red(), Words("words")]
    result = score(folder, first, tmp_path / "first.csv", cache=tmp_path / "cache", progress=False)
    assert result.hits == {"red": 2, "words": 1}  # red reads no prompt, and neither reads the note
    assert sum(first[0]._seen) == 2
    assert [float(row["red"]) for row in rows(result.out)[1:]] == pytest.approx([red(1)] * 3, abs=1e-6)

    again = [Red(), Words("words")]
    other = score(folder, again, tmp_path / "second.csv", cache=tmp_path / "cache", progress=False)
    assert again[0]._seen == again[1]._seen == []
    assert other.hits == {"red": 4, "words": 3}
    assert other.out.read_bytes() == result.out.read_bytes()

    (folder / "a.json").write_text('{"weight": 2}')
    changed = [Red(), Words("words")]
    score(folder, changed, tmp_path / "third.csv", cache=tmp_path / "cache", progress=False)
    assert (changed[0]._seen, changed[1]._seen) == ([], [1])


def test_a_cache_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "scores.sqlite").write_text("no database, and long enough to be looked at as one" * 20)
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        Cache(tmp_path / "scores.sqlite")
