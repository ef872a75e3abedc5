"""The oracle accepts what was drawn, and nothing that says one fact otherwise."""

import numpy as np
import pytest
import torch

from diffalign.zoo import oracle
from diffalign.zoo.render import AREA, coverage, render
from diffalign.zoo.spoil import bend, distract, roughen
from diffalign.zoo.world import SHAPES, Scene, Thing, mirrored, one_edit, sample_scene


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, split) for split in ("train", "validation", "test") for _ in range(32)]
    images = (render(scenes, rng) * 255).round() / 255
    return scenes, images, oracle.look(images)


def test_every_render_satisfies_its_caption(drawn):
    scenes, images, _ = drawn
    verdicts = oracle.judge(images, [scene.caption for scene in scenes])
    assert verdicts.all_correct.all()
    assert (verdicts.fraction == 1).all()


def test_every_render_satisfies_its_caption_from_the_other_side(drawn):
    scenes, _, found = drawn
    for scene, objects in zip(scenes, found, strict=True):
        if scene.relation:
            assert all(oracle.check(objects, mirrored(scene)).values())


def test_no_render_satisfies_a_caption_with_one_wrong_fact(drawn):
    scenes, _, found = drawn
    for scene, objects in zip(scenes, found, strict=True):
        for kind, edits in one_edit(scene).items():
            for edit in edits:
                holds = all(oracle.check(objects, edit).values())
                # Dropping the size leaves the caption true.
                less_said = (
                    kind == "size" and len(edit.caption) < len(scene.caption) and "medium" in _sizes(edit, scene)
                )
                assert holds == less_said, (scene.caption, edit.caption)


def _sizes(edit, scene):
    return [a.size for a, b in zip(edit.things, scene.things, strict=True) if a != b]


def test_facts_name_what_is_wrong():
    scene = Scene((Thing("red", "circle", "small"), Thing("blue", "star")), "left of")
    found = oracle.look(render([scene], np.random.default_rng(0)))[0]
    facts = oracle.check(found, Scene((Thing("red", "square", "small"), Thing("blue", "star")), "above"))
    assert facts == {
        "count": True, "color 1": True, "shape 1": False, "size 1": True,
        "color 2": True, "shape 2": True, "relation": False,
    }  # fmt: skip


def test_an_empty_image_satisfies_nothing():
    verdicts = oracle.judge(torch.ones(1, 3, 64, 64), ["a red circle above a blue star"])
    assert not verdicts.all_correct[0]
    assert verdicts.fraction[0] == 0


def test_spoilt_images_are_mostly_rejected_and_rough_ones_mostly_kept(drawn):
    scenes, images, _ = drawn
    captions = [scene.caption for scene in scenes]
    rng = np.random.default_rng(1)
    spoilt = torch.stack([distract(scene, rng) for scene in scenes])
    # A spoilt image may still be right: an extra object can hide the one it copies, a smear can be mild.
    assert oracle.judge(spoilt, captions).all_correct.float().mean() < 0.15
    bent = torch.stack([bend(scene, rng) for scene in scenes])
    # Most outlines that are only a little out of shape fail one fact, and what they fail is the shape or the count.
    verdicts = oracle.judge(bent, captions)
    assert 0.3 < verdicts.all_correct.float().mean() < 0.6
    wrong = [name.split()[0] for facts in verdicts.facts for name, holds in facts.items() if not holds]
    assert sum(name in ("shape", "count") for name in wrong) > 0.7 * len(wrong)
    rough = roughen(images, torch.Generator().manual_seed(0))
    assert oracle.judge(rough, captions).all_correct.float().mean() > 0.9


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        oracle.judge(torch.ones(2, 3, 64, 64), ["a red circle"])


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_drawn_shape_has_the_stated_area_and_centroid(shape):
    mask = coverage(torch.tensor([shape]), torch.tensor([[30.0, 33.0]]), torch.tensor([11.0]), supersample=4)[0]
    axis = torch.arange(64) + 0.5
    assert mask.sum() / 121 == pytest.approx(float(AREA[shape]), rel=5e-3)
    assert (mask.sum(0) * axis).sum() / mask.sum() == pytest.approx(30, abs=0.05)
    assert (mask.sum(1) * axis).sum() / mask.sum() == pytest.approx(33, abs=0.05)
