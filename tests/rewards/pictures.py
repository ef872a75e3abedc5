"""Pictures with edges and flat colour, and prompts beside them."""

import numpy as np
from PIL import Image

PROMPTS = ["a red circle", "two blue squares", "a big square"]


def pictures(count=3, height=50, width=40, seed=0, radius2=150):
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    for _ in range(count):
        disc = ((rows - generator.integers(height)) ** 2 + (columns - generator.integers(width)) ** 2) < radius2
        colour, ground = generator.integers(0, 256, (2, 3))
        yield Image.fromarray(np.where(disc[..., None], colour, ground).astype(np.uint8))


def larger_pictures(count=3, height=84, width=112, seed=0):
    return pictures(count, height, width, seed, radius2=700)
