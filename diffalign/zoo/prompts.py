"""The prompt files: captions of each split, with what they say as metadata."""

import json
from pathlib import Path

import numpy as np

from diffalign.zoo.world import SINGLES, Scene, Split, sample_scene

SEED = 61
SIZES: dict[Split, int] = {"train": 600, "validation": 64, "test": 512}


def captions(split: Split) -> list[Scene]:
    """Distinct scenes: every one-object scene of the split, the rest with two objects, in random order."""
    rng = np.random.default_rng([SEED, list(SIZES).index(split)])
    scenes = {Scene((thing,)).caption: Scene((thing,)) for thing in SINGLES[split]}
    while len(scenes) < SIZES[split]:
        scene = sample_scene(rng, split, objects=2)
        scenes.setdefault(scene.caption, scene)
    order = rng.permutation(SIZES[split])
    chosen = list(scenes.values())
    return [chosen[i] for i in order]


def write(folder: Path) -> list[Path]:
    """Write `shapes-{train,validation,test}.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split in SIZES:
        rows = [
            {"prompt": scene.caption, "objects": len(scene.things), "relation": scene.relation}
            for scene in captions(split)
        ]
        file = folder / f"shapes-{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(file)
    return files
