"""The bits say the scene, from either side."""

import torch

from diffalign.zoo.symbols import COUNT, bits
from diffalign.zoo.text import clip_tokenizer, read
from diffalign.zoo.world import Scene, Thing, mirrored, one_edit

SCENE = Scene((Thing("red", "circle", "small"), Thing("blue", "star")), "left of")


def test_bits_are_of_the_picture_and_not_of_the_wording():
    assert bits(SCENE).shape == (COUNT,)
    assert bits(SCENE).equal(bits(mirrored(SCENE)))
    assert bits(SCENE).sum() == 8


def test_every_edit_changes_the_bits():
    for edits in one_edit(SCENE).values():
        assert all(not bits(edit).equal(bits(SCENE)) for edit in edits)


def test_ids_are_read_back_as_scenes():
    tokenizer = clip_tokenizer()
    ids = torch.tensor(tokenizer([SCENE.caption, "", "an orange star"], padding="max_length").input_ids)
    assert read(tokenizer, ids) == [SCENE, None, Scene((Thing("orange", "star"),))]
