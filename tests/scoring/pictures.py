"""Small pictures in files, and rewards of their pixels that count what they score."""

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from diffalign import media
from diffalign.rewards import Reward


class Red(Reward):
    """Mean of the red channel; fails on a picture whose first pixel is black."""

    differentiable = True
    needs = ()

    def __init__(self, name="red"):
        self.name = name
        self._seen = []  # batch sizes

    def values(self, images, prompts, metadata):
        self._seen.append(len(images))
        value = images[:, 0].mean((1, 2))
        return value.masked_fill(images[:, :, 0, 0].sum(1) == 0, float("nan"))


class Words(Red):
    """Length of the prompt, plus the weight in the metadata, plus a little of the pixels."""

    needs = ("prompt", "weight")

    def values(self, images, prompts, metadata):
        value = super().values(images, prompts, metadata)
        return value + value.new_tensor([len(p) + m["weight"] for p, m in zip(prompts, metadata, strict=True)])


class Redder(Red):
    """How much redder than the mean of its reference pictures."""

    needs = files = ("reference",)

    def __init__(self, name="redder"):
        super().__init__(name)

    def values(self, images, prompts, metadata):
        value = super().values(images, prompts, metadata)
        return value - value.new_tensor([_mean_red(entry["reference"]) for entry in metadata])


def _mean_red(paths):
    paths = paths if isinstance(paths, list) else [paths]
    if not paths:
        raise ValueError("reference is an empty list")
    return sum(float(media.from_pil(media.open_image(path))[0, 0].mean()) for path in paths) / len(paths)


def picture(number, size=(8, 6)):
    pixels = np.random.default_rng(number).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number, **options):
    buffer = io.BytesIO()
    picture(number, **options).save(buffer, "png")
    return buffer.getvalue()


def red(number, **options):
    """What Red says of a picture."""
    return float(np.asarray(picture(number, **options))[..., 0].astype(np.float32).mean() / 255)


def folder_of(path, count, prompts=True):
    path.mkdir(parents=True)
    for number in range(count):
        picture(number, size=(8, 6) if number % 3 else (5, 9)).save(path / f"{number:03d}.png")
        if prompts:
            (path / f"{number:03d}.txt").write_text(f"prompt {number % 4}\n")
    return path


def rows(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
