"""Text in images: the distance against its definition, the target's rules, and rendered text read by real weights."""

import math
from functools import cache

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign import media
from diffalign.rewards.ocr import TextMatch, edit_distance, target_text, text_match


def test_edit_distance_is_its_recursion():
    @cache
    def defined(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(defined(a[1:], b) + 1, defined(a, b[1:]) + 1, defined(a[1:], b[1:]) + (a[0] != b[0]))

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 8, (2,), generator=generator).tolist()
        a, b = ("".join("abc"[i] for i in torch.randint(0, 3, (n,), generator=generator)) for n in lengths)
        assert edit_distance(a, b) == defined(a, b), (a, b)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("read", "target", "match"),
    [
        ("Hello World", "hello  world", 1.0),
        ("welcome: HELLO!", "Hello", 1.0),  # a part of what is read
        ("", "abcd", 0.0),
        ("abxd", "abcd", 0.75),
        ("zzzzzzzzzzzz", "abcd", 0.0),  # no worse than nothing
        ("abcdefgh"[::-1], "abcd", 0.0),
    ],
)
def test_match(read, target, match):
    assert text_match(read, target) == match


def test_the_target_is_the_metadata_or_the_first_quoted_span():
    assert target_text('a sign "Open" and "Shut"', {}) == "Open"
    assert target_text("a sign “Open”", {}) == "Open"
    assert target_text('a sign "Open"', {"text": "Shut"}) == "Shut"
    for prompt, metadata in [
        ("a sign", {}),
        ('an inch is 1"', {}),
        ('"  "', {}),
        ("a", {"text": ""}),
        ("a", {"text": 3}),
    ]:
        with pytest.raises(ValueError, match="double quotes"):
            target_text(prompt, metadata)


def rendered(text, colours=("black", "white")):
    image = Image.new("RGB", (220, 220), colours[1])
    ImageDraw.Draw(image).text((12, 80), text, fill=colours[0], font=ImageFont.load_default(size=40))
    return media.from_pil(image)


@pytest.fixture(scope="module")
def reward():
    return TextMatch()


def test_rendered_text_is_read(reward):
    images = torch.cat([rendered("OPEN 24 h"), rendered("OPEN 24 h", ("white", "darkred")), rendered("")])
    prompts = ['a shop, "Open 24 h"', 'a door with "closed now"', 'a shop, "Open 24 h"']
    score = reward(images, prompts, [{}, {"text": "open24x"}, {}])
    assert score.valid.all(), score.reasons
    # open24h for open24x is one wrong letter of seven
    torch.testing.assert_close(score.value, torch.tensor([1.0, 6 / 7, 0.0]))
    assert torch.equal(reward(images[1:2], prompts[1:2], [{"text": "open24x"}]).value, score.value[1:2])


def test_no_target_and_no_image_are_failed_scores(reward):
    images = torch.cat([rendered("Yes"), rendered("Yes"), rendered("Yes")])
    images[2, 0, 0, 0] = math.nan
    score = reward(images, ['"Yes"', "a sign that says Yes", '"Yes"'])
    assert score.valid.tolist() == [True, False, False]
    assert score.value[0] == 1
    assert "no text to look for" in score.reasons[1]
    assert score.reasons[2] == "the image has pixels that are not finite"
