"""The contact sheet: each image where its caption says it is."""

import numpy as np
import pytest
from PIL import Image

from diffalign.report import before_after


def noise(seed, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_small_images_are_enlarged_by_whole_pixels():
    base, tuned = [noise(i) for i in range(4)], [noise(9 + i) for i in range(4)]
    sheet = np.asarray(before_after(base, tuned, ["a"] * 4, columns=2, tile=160))
    first = np.asarray(base[0])
    matches = [
        (y, x)
        for y in range(30)
        for x in range(90)
        if np.array_equal(sheet[y : y + 160 : 5, x : x + 160 : 5], first)
        and np.array_equal(sheet[y, x], sheet[y + 4, x + 4])
    ]
    assert len(matches) == 1
    y, x = matches[0]
    below = sheet[y + 164 : y + 324 : 5, x : x + 160 : 5]
    assert np.array_equal(below, np.asarray(tuned[0]))
    beside = sheet[y : y + 160 : 5, x + 168 : x + 328 : 5]
    assert np.array_equal(beside, np.asarray(base[1]))


def test_large_images_shrink_and_long_captions_are_cut():
    long = "a very long prompt " * 40 + "unbreakable" * 30
    one = before_after([noise(0, (300, 200))], [noise(1, (300, 200))], [long], tile=120)
    other = before_after([noise(0, (300, 200))], [noise(1, (300, 200))], ["a b c " * 12], tile=120)
    assert one.size == other.size  # three lines at most
    assert one.width < 250


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 base images, 1 tuned and 2 captions"):
        before_after([noise(0)], [noise(1)], ["a", "b"])
