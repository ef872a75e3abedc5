"""Tiny made-up copies of the published preference sets, of pictures whose red level is what a reward scores."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffalign.media import save_video
from diffalign.rewards import Reward
from tests.scoring.pictures import Red


class RedVideo(Reward):
    """Mean of the red channel of a video."""

    name = "red-video"
    media = "video"
    needs = ()

    def __init__(self):
        self._seen = []

    def values(self, images, prompts, metadata):
        self._seen.append(len(images))
        return images[:, :, 0].mean((1, 2, 3))


class Logit(Red):
    """The red level as a logit: 1 is ten levels."""

    def values(self, images, prompts, metadata):
        return super().values(images, prompts, metadata) * 25.5


def plain(level):
    return Image.new("RGB", (4, 4), (level, 1, 1))


def put(folder, name, level):
    """A picture of one colour under its name, without loss."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    plain(level).save(
        path, "webp" if path.suffix == ".webp" else "png", **({"lossless": True} if path.suffix == ".webp" else {})
    )


def ranked(folder, names_key, ranks_key, media, entries, suffix):
    """test.json and its pictures; entries are (prompt, ranks, levels), a level of None being a missing file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, ranks, levels) in enumerate(entries):
        names = [f"part-{number}/{place}{suffix}" for place in range(len(levels))]
        for name, level in zip(names, levels, strict=True):
            if level is not None:
                put(folder / media, name, level)
        rows.append({"id": str(number), "prompt": prompt, names_key: names, ranks_key: ranks})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def imagereward(folder, entries, media="test_images"):
    return ranked(folder, "generations", "ranking", media, entries, ".webp")


def hpdv2(folder, entries):
    return ranked(folder, "image_path", "rank", "test", entries, ".jpg")


def hpdv3(folder, pairs):
    """Pairs are (prompt, level of the better, level of the worse)."""
    folder.mkdir(parents=True)
    rows = []
    for number, (prompt, *levels) in enumerate(pairs):
        names = [f"images/{number}-{side}.png" for side in "ab"]
        for name, level in zip(names, levels, strict=True):
            put(folder, name, level)
        rows.append({"prompt": prompt, "path1": names[0], "path2": names[1], "confidence": 0.9})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def pickapic(folder, splits):
    """Splits are name -> rows of (caption, level_0, level_1, label_0, has_label)."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        columns = {
            "caption": [caption for caption, *_ in rows],
            "jpg_0": [_encoded(level) for _, level, *_ in rows],
            "jpg_1": [_encoded(level) for _, _, level, *_ in rows],
            "label_0": [float(label) for *_, label, _ in rows],
            "label_1": [1 - float(label) for *_, label, _ in rows],
            "has_label": [known for *_, known in rows],
        }
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-00000-of-00001-0123abcd.parquet")
    return folder


def _encoded(level):
    buffer = io.BytesIO()
    plain(level).save(buffer, "png")
    return buffer.getvalue()


def videogen(folder, levels, pairs):
    """Levels are name -> red level of a video; pairs are (A, B, prompt, Overall, VQ, MQ, TA)."""
    for name, level in levels.items():
        frames = torch.full((3, 3, 16, 16), 1, dtype=torch.uint8)
        frames[:, 0] = level
        save_video(frames, folder / "videos" / "model" / f"{name}.mp4", fps=8)
    with (folder / "videogen-rewardbench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall", "fps_A"])
        for a, b, prompt, overall, vq, mq, ta in pairs:
            paths = [f"videos/model/{name}.mp4" for name in (a, b)]
            writer.writerow([*paths, "model", "model", prompt, vq, mq, ta, overall, 8])
    return folder
