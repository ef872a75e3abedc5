"""The bits say the scene, from either side."""

from diffalign.zoo.symbols import COUNT, bits, facts
from diffalign.zoo.world import Scene, Thing, mirrored, one_edit

SCENE = Scene((Thing("red", "circle", "small"), Thing("blue", "star")), "left of")


def test_bits_are_of_the_picture_and_not_of_the_wording():
    assert bits([SCENE, mirrored(SCENE)]).shape == (2, COUNT)
    assert bits([SCENE]).equal(bits([mirrored(SCENE)]))
    assert bits([SCENE]).sum() == 6


def test_each_object_has_facts_of_its_own():
    assert facts(SCENE).sum(1).tolist() == [3, 3]
    assert facts(mirrored(SCENE)).equal(facts(SCENE).flip(0))
    assert facts(Scene(SCENE.things[:1])).sum(1).tolist() == [3, 0]


def test_every_edit_changes_the_bits():
    for edits in one_edit(SCENE).values():
        assert all(not bits([edit]).equal(bits([SCENE])) for edit in edits)
