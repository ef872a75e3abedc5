"""Captions say scenes and scenes are read from captions; splits share nothing."""

import itertools
import json

import numpy as np
import pytest

from diffalign.registry import data_root
from diffalign.zoo import prompts
from diffalign.zoo.world import (
    COLORS,
    PAIRS,
    RELATIONS,
    SHAPES,
    SINGLES,
    SIZES,
    Scene,
    Thing,
    mirrored,
    one_edit,
    pair_of,
    parse,
    sample_scene,
    split_of,
)

THINGS = [Thing(*kind) for kind in itertools.product(COLORS, SHAPES, SIZES)]


def test_every_caption_of_the_grammar_is_read_back_as_its_scene():
    pairs = [(a, b) for a, b in itertools.product(THINGS, THINGS) if a.color != b.color]
    scenes = [Scene((thing,)) for thing in THINGS]
    scenes += [Scene(pair, relation) for pair in pairs for relation in RELATIONS]
    assert len(scenes) == 72 + 72 * 60 * 4
    captions = {scene.caption for scene in scenes}
    assert len(captions) == len(scenes)
    assert all(parse(scene.caption) == scene for scene in scenes)


@pytest.mark.parametrize(
    "caption",
    ["", "a red", "red circle", "a pink circle", "a red circle beside a blue star", "a red circle left of a red star"],
)
def test_a_caption_outside_the_grammar_is_refused(caption):
    with pytest.raises(ValueError, match=r"shapes world|is not"):
        parse(caption)


def test_captions_read_as_english():
    scene = Scene((Thing("orange", "star"), Thing("red", "circle", "small")), "above")
    assert scene.caption == "an orange star above a small red circle"
    assert mirrored(scene).caption == "a small red circle below an orange star"


def test_an_edit_changes_one_fact():
    scene = Scene((Thing("red", "circle"), Thing("blue", "star", "large")), "left of")
    edits = one_edit(scene)
    assert {kind: len(group) for kind, group in edits.items()} == {
        "color": 8, "shape": 6, "size": 4, "relation": 3, "swap": 1,
    }  # fmt: skip
    everything = [edit for group in edits.values() for edit in group]
    assert scene not in everything
    assert len(set(everything)) == len(everything)


def test_splits_hold_out_pairs_and_singles():
    assert {name: len(pairs) for name, pairs in PAIRS.items()} == {"validation": 24, "test": 36, "train": 180}
    assert len({pair for pairs in PAIRS.values() for pair in pairs}) == 240
    assert len({thing for things in SINGLES.values() for thing in things}) == 72
    # Every word that is tested was learnt, alone and in pairs.
    seen = {kind for pair in PAIRS["train"] for kind in pair}
    assert seen == set(itertools.product(COLORS, SHAPES))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples_stay_in_their_split(split):
    rng = np.random.default_rng(0)
    assert all(split_of(sample_scene(rng, split)) == split for _ in range(500))


def test_shipped_prompts_are_what_the_code_writes(tmp_path):
    for file in prompts.write(tmp_path):
        assert file.read_bytes() == (data_root() / "prompts" / file.name).read_bytes()


def test_shipped_prompts_are_distinct_and_share_no_combination():
    captions, pairs = {}, {}
    for split in ("train", "validation", "test"):
        lines = (data_root() / "prompts" / f"shapes-{split}.jsonl").read_text().splitlines()
        scenes = [parse(json.loads(line)["prompt"]) for line in lines]
        captions[split] = {scene.caption for scene in scenes}
        pairs[split] = {pair_of(scene) for scene in scenes if scene.relation}
        assert len(captions[split]) == len(lines)
    assert [len(captions[s]) for s in ("train", "validation", "test")] == [600, 64, 512]
    for kind in (captions, pairs):
        for a, b in itertools.combinations(kind.values(), 2):
            assert not a & b
