"""GenEval's rules on detections made by hand, then the networks around them."""

import re
from zlib import crc32

import pytest
import torch

from diffalign import media
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.geneval import (
    Found,
    GenEval,
    InstanceDetector,
    is_correct,
    relations,
    share_met,
    sort_out,
)
from diffalign.rewards.geneval.colours import Colours, cutting
from diffalign.rewards.geneval.rules import read_clauses
from tests.rewards.pictures import pictures
from tests.rewards.tiny_vision import write_mask2former, write_yolos


def at(x, y, name="dog", score=0.95, size=10):
    """A detection with its centre at (x, y)."""
    return Found(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def seen(*detections, counting=False):
    return sort_out(detections, counting)


def no_colour(objects, name):
    raise AssertionError("no clause asks for a colour")


def painted(**colours):
    """Colours by class: the given ones in the order of the objects."""
    return lambda objects, name: list(colours[name])[: len(objects)]


def both(objects, metadata, colours=no_colour):
    return is_correct(objects, metadata, colours), share_met(objects, metadata, colours)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), {"left of"}),
        ((80, 0, 90, 10), {"right of"}),
        ((40, -40, 50, -30), {"above"}),
        ((40, 40, 50, 50), {"below"}),
        ((0, -40, 10, -30), {"left of", "above"}),
        ((80, 40, 90, 50), {"right of", "below"}),
        ((40, 0, 50, 10), set()),  # the same place
        ((42, 0, 52, 10), set()),  # apart by 2, a tenth of both sizes
        ((43, 0, 53, 10), set()),  # by 3: what is left, 1 of 3, is no half
        ((45, 0, 55, 10), {"right of"}),  # by 5: 3 of 5
        ((44, 0, 54, 10), set()),  # by 4: 2 of 4 is half, and must be more
        ((58, 18, 68, 28), {"right of", "below"}),  # 16 / (18 sqrt 2) of each
        ((70, 15, 80, 25), {"right of"}),  # 13 of 33.5 down is no half
    ],
)
def test_relations_of_boxes(box, expected):
    assert relations(box, (40, 0, 50, 10)) == expected
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations((40, 0, 50, 10), box) == {mirrored[each] for each in expected}


def test_what_counts_as_there():
    scores = [0.2, 0.3, 0.31, 0.9, 0.91, 0.99]
    objects = seen(*(at(i, 0, score=s) for i, s in enumerate(scores)), at(0, 0, "cat", 0.1))
    assert [found.score for found in objects["dog"]] == [0.99, 0.91, 0.9, 0.31]  # more than the threshold
    assert not objects.get("cat")
    strict = seen(*(at(i, 0, score=s) for i, s in enumerate(scores)), counting=True)
    assert [found.score for found in strict["dog"]] == [0.99, 0.91]
    many = seen(*(at(i, 0, score=0.5 + i / 100) for i in range(20)), *(at(i, 0, "cat") for i in range(3)))
    assert [found.score for found in many["dog"]] == [0.5 + i / 100 for i in reversed(range(4, 20))]
    assert len(many["cat"]) == 3
    assert len(seen(at(0, 0), at(0, 0))["dog"]) == 2  # boxes that overlap are not suppressed


def dogs(count):
    return [at(20 * i, 0) for i in range(count)]


@pytest.mark.parametrize(
    ("found", "asked", "correct", "share"),
    [
        (1, 1, True, 1.0),
        (0, 1, False, 0.0),
        (2, 1, True, 0.0),  # GenEval: at least one; the share wants the number
        (5, 1, True, 0.0),  # not below 0
        (3, 4, False, 0.75),
        (4, 4, True, 1.0),
        (6, 4, True, 0.5),
    ],
)
def test_numbers(found, asked, correct, share):
    assert both(seen(*dogs(found)), {"include": [{"class": "dog", "count": asked}]}) == (correct, share)


@pytest.mark.parametrize(("found", "correct", "share"), [(1, False, 0.25), (4, True, 1.0), (5, False, 0.75)])
def test_counting_excludes_one_more(found, correct, share):
    metadata = {"include": [{"class": "dog", "count": 4}], "exclude": [{"class": "dog", "count": 5}]}
    assert both(seen(*dogs(found)), metadata) == (correct, share)


def test_another_class_may_be_excluded():
    metadata = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cat", "count": 1}]}
    assert both(seen(at(0, 0)), metadata) == (True, 1.0)
    assert both(seen(at(0, 0), at(9, 9, "cat")), metadata) == (False, 0.5)
    assert both(seen(at(9, 9, "cat")), metadata) == (False, 0.0)


def test_two_objects():
    metadata = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    assert both(seen(at(0, 0), at(0, 0, "cat")), metadata) == (True, 1.0)
    assert both(seen(at(0, 0)), metadata) == (False, 0.5)
    assert both({}, metadata) == (False, 0.0)


def test_colours():
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert both(seen(*dogs(2)), metadata, painted(dog=["red", "red"])) == (True, 1.0)
    assert both(seen(*dogs(2)), metadata, painted(dog=["red", "blue"])) == (False, 0.75)
    assert both(seen(*dogs(2)), metadata, painted(dog=["pink", "blue"])) == (False, 0.5)
    assert both(seen(*dogs(1)), metadata, painted(dog=["red"])) == (False, 0.25)  # a wrong number: no colour
    # GenEval asks the two likeliest of three, and the share for two in all
    assert both(seen(*dogs(3)), metadata, painted(dog=["red", "red", "blue"])) == (True, 0.25)


def test_two_objects_of_two_colours():
    clauses = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "black"}]
    objects = seen(at(0, 0), at(0, 0, "cat"))
    assert both(objects, {"include": clauses}, painted(dog=["red"], cat=["black"])) == (True, 1.0)
    assert both(objects, {"include": clauses}, painted(dog=["black"], cat=["red"])) == (False, 0.5)


POSITION = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}


def test_positions():
    cat = at(50, 0, "cat")
    assert both(seen(cat, at(0, 0)), POSITION) == (True, 1.0)
    # the known bug of Flow-GRPO, which gives (1 + 1 + 0 + 1) / 4 here
    assert both(seen(cat, at(90, 0)), POSITION) == (False, 2 / 3)
    assert both(seen(cat, at(50, 0)), POSITION) == (False, 2 / 3)
    # the number of the first is wrong: there is nothing to be left of; each clause keeps its terms
    assert both(seen(at(0, 0)), POSITION) == (False, 1 / 3)
    assert both(seen(cat), POSITION) == (False, 1 / 3)
    # of more than asked for, GenEval takes the likeliest
    likelier = at(90, 0, score=0.99)
    assert both(seen(cat, at(0, 0, score=0.5), likelier), POSITION) == (False, 1 / 3)
    assert both(seen(cat, at(0, 0, score=0.99), at(90, 0, score=0.5)), POSITION) == (True, 1 / 3)


def test_each_of_a_group_is_placed():
    metadata = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["above", 0]}]}
    cats = [at(0, 50, "cat"), at(30, 50, "cat")]
    assert both(seen(*cats, at(0, 0), at(20, 0)), metadata) == (True, 1.0)
    assert both(seen(*cats, at(0, 0), at(20, 90)), metadata) == (False, 2 / 3)


def test_colour_and_position_of_one_object_are_two_terms():
    clauses = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["above", 0]}]
    objects = seen(at(0, 50, "cat"), at(0, 0))
    assert both(objects, {"include": clauses}, painted(dog=["red"])) == (True, 1.0)
    assert both(objects, {"include": clauses}, painted(dog=["blue"])) == (False, 0.5)  # not placed: another dog


def test_a_position_refers_to_what_was_met():
    clauses = [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
        {"class": "cow", "count": 1, "position": ["below", 1]},
    ]
    objects = seen(at(50, 0, "cat"), at(0, 0), at(0, 50, "cow"))
    assert both(objects, {"include": clauses}, painted(cat=["red"])) == (True, 1.0)
    # a blue cat is none to be left of, and so the cow has no dog either: 3 numbers of 6 terms
    assert both(objects, {"include": clauses}, painted(cat=["blue"])) == (False, 0.5)


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ({"class": "dog"}, "class 'dog' and count None"),
        ({"class": "dog", "count": 0}, "count 0"),
        ({"count": 1}, "class None"),
        ({"class": "dog", "count": 1, "color": "beige"}, "color 'beige': GenEval knows red, orange"),
        ({"class": "dog", "count": 1, "position": ["beside", 0]}, "one of left of, right of"),
        ({"class": "dog", "count": 1, "position": ["above", 1]}, "an earlier clause"),
        ({"class": "dog", "count": 1, "position": ["above", -1]}, "an earlier clause"),
        ({"class": "dog", "count": 1, "position": "above"}, "position 'above'"),
        ("dog", "a list of objects"),
    ],
)
def test_wrong_clauses_are_named(clause, words):
    with pytest.raises(ValueError, match=words):
        read_clauses({"include": [{"class": "cat", "count": 1}, clause]}, "include")


def test_an_object_is_cut_out_on_grey():
    image = torch.arange(3 * 6 * 8).reshape(3, 6, 8) / 255
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 3] = mask[3, 4] = True
    cut = cutting(image, Found("dog", 1.0, (3.0, 2.0, 5.0, 4.0), mask))
    expected = torch.tensor([[19, 153], [27, 28]]) / 255
    torch.testing.assert_close(cut[0], expected)
    assert cut.shape == (3, 2, 2)
    assert cutting(image, Found("dog", 1.0, (3.4, 1.6, 5.5, 4.4))).shape == (3, 2, 3)  # as Pillow rounds
    assert cutting(image, Found("dog", 1.0, (-3.0, -2.0, 50.0, 40.0))).shape == image.shape
    assert cutting(image, Found("dog", 1.0, (9.0, 7.0, 9.2, 7.2))).shape == (3, 1, 1)


class Lottery(DualEncoder):
    """Text to numbers by lot, and images by their colours: no two captions are alike."""

    label, token_limit = "lottery", 77

    def image_features(self, images):
        flat = media.resize(images, (4, 4)).flatten(1) - 0.5
        return flat / flat.norm(dim=1, keepdim=True)

    def encode_text(self, prompt):
        return torch.randn(48, generator=torch.Generator().manual_seed(crc32(prompt.encode())))

    def count_tokens(self, prompt):
        return 1

    model = torch.nn.Linear(1, 1)


def test_colours_are_those_of_the_encoder():
    encoder, image = Lottery(), media.from_pil(next(pictures(1, 40, 50)))[0]
    boxes = [Found("dog", 1.0, box) for box in ((0, 0, 20, 20), (10, 5, 50, 40), (0, 30, 9, 40))]
    found = Colours(encoder)(image, boxes, "dog")
    names = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    likeness = []
    for colour in names:
        captions = (f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object")
        mean = sum(encoder.text_features([caption])[0] for caption in captions)
        likeness.append(mean / mean.norm())
    for box, colour in zip(boxes, found, strict=True):
        left, top, right, bottom = map(int, box.box)
        features = encoder.image_features(image[None, :, top:bottom, left:right])[0]
        assert colour == names[int((torch.stack(likeness) @ features).argmax())]
    assert len(set(found)) > 1
    assert Colours(encoder)(image, [], "dog") == []


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return InstanceDetector(write_mask2former(tmp_path_factory.mktemp("models") / "mask2former"))


def test_instances_of_logits_made_by_hand(detector):
    classes = torch.full((4, 5), -20.0)
    classes[0, 1] = 20  # a mouse, surely
    classes[1, 3], classes[1, 0] = 1.0, 1.0  # a dog or a person, one half each
    classes[2, 4] = 20  # nothing
    classes[3, 2] = 20  # a table without a pixel
    masks = torch.full((4, 4, 4), -3.0)
    masks[0, 1:3, 2:] = 3.0
    masks[1] = 2.0
    found = {each.name: each for each in detector._from_masks(classes, masks, (4, 4))}
    assert set(found) == {"computer mouse", "dog", "person"}
    assert found["computer mouse"].box == (2.0, 1.0, 4.0, 3.0)
    assert found["computer mouse"].mask.sum() == 4
    assert abs(found["computer mouse"].score - torch.tensor(3.0).sigmoid()) < 1e-6
    assert abs(found["dog"].score - torch.tensor(2.0).sigmoid() / 2) < 1e-6
    assert found["dog"].box == (0.0, 0.0, 4.0, 4.0)
    larger = detector._from_masks(classes, masks, (8, 16))
    mouse = next(each for each in larger if each.name == "computer mouse")
    assert mouse.box == (8.0, 2.0, 16.0, 6.0)


def test_instances_equal_those_of_the_processor(detector):
    wide = list(pictures(2, 40, 50))
    seen = detector.processor(wide, return_tensors="pt")
    with torch.no_grad():
        output = detector.model(**seen)
    expected = detector.processor.post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)] * 2
    )
    for mine, theirs in zip(detector(media.from_pil(wide)), expected, strict=True):
        assert len(mine) == len(theirs["segments_info"]) > 0
        for a, b in zip(
            sorted(each.score for each in mine), sorted(s["score"] for s in theirs["segments_info"]), strict=True
        ):
            assert abs(a - b) < 0.02  # masks of 50 x 40 and of 384 x 384 pixels
        names = sorted(detector.names[s["label_id"]] for s in theirs["segments_info"])
        assert sorted(each.name for each in mine) == names


def test_boxes_of_an_object_detector(tmp_path, monkeypatch):
    detector = InstanceDetector(write_yolos(tmp_path / "yolos"))
    assert not detector.has_masks
    logits, boxes = torch.full((1, 5, 5), -20.0), torch.full((1, 5, 4), 0.5)
    logits[..., 4], logits[0, 2, 1], logits[0, 2, 4] = 20.0, 20.0, -20.0
    boxes[0, 2] = torch.tensor([0.5, 0.25, 0.4, 0.5])  # centre and size, of the image's
    from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

    output = YolosObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    monkeypatch.setattr(detector.model, "forward", lambda **_: output)
    ((mouse,),) = detector(torch.rand(1, 3, 40, 50))
    assert mouse.name == "computer mouse"
    assert mouse.score == pytest.approx(1.0)
    assert mouse.box == pytest.approx((15.0, 0.0, 35.0, 20.0))
    assert mouse.mask is None


def test_the_reward_scores_images_and_fails_one_by_one(detector, tiny_clip):
    images = media.from_pil(list(pictures(3, 40, 50)))
    reward, strict = (GenEval(detector, tiny_clip, strict=flag) for flag in (False, True))
    count = len(sort_out(detector(images[:1])[0], False)["dog"])
    metadata = [
        {"include": [{"class": "dog", "count": 2 * count}], "tag": "single_object"},
        {"include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "person", "count": 1}]},
        {"include": [{"class": "dog", "count": 3}], "tag": "counting"},
    ]
    score = reward(images, [""] * 3, metadata)
    assert score.valid.all()
    assert score.value[0] == 0.5
    assert score.value[2] == 0  # nothing is above 0.9
    assert strict(images, [""] * 3, metadata).value.tolist() == [0.0, 0.0, 0.0]
    assert strict(images[:1], [""], [{"include": [{"class": "dog", "count": count}]}]).value.tolist() == [1.0]
    alone = torch.cat([reward(images[i : i + 1], [""], metadata[i : i + 1]).value for i in range(3)])
    torch.testing.assert_close(score.value, alone)

    broken = images.clone()
    broken[0, 0, 0, 0] = torch.nan
    wrong = [metadata[2], {}, {"include": [{"class": "unicorn", "count": 1}]}]
    failed = reward(broken, [""] * 3, wrong)
    assert not failed.valid.any()
    for index, words in enumerate(["pixels that are not finite", "include is empty", "detects no 'unicorn'"]):
        assert re.search(words, failed.reasons[index])
