"""The oracle against eyes: 200 generated images, 100 of each pipeline, judged one by one before the oracle saw them.

`looked_at/generated.png` holds them, 20 a row, in 8 bits; `looked_at/verdicts.jsonl` says of each whether it satisfies
its prompt. No threshold of the oracle was set on them. Where both differ, the oracle is mostly the stricter: it refuses
wobbly stars and triangles that an eye lets pass.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.zoo.oracle import judge

FOLDER = Path(__file__).parent / "looked_at"


def test_the_oracle_agrees_with_eyes_as_stated():
    rows = [json.loads(line) for line in (FOLDER / "verdicts.jsonl").read_text().splitlines()]
    sheet = torch.from_numpy(np.array(Image.open(FOLDER / "generated.png").convert("RGB"))) / 255
    images = sheet.permute(2, 0, 1).unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).reshape(-1, 3, 64, 64)
    eye = torch.tensor([row["satisfied"] for row in rows])
    oracle = judge(images, [row["prompt"] for row in rows]).all_correct
    assert len(rows) == len(images) == 200
    assert (eye == oracle).float().mean() == pytest.approx(0.955)
    assert [int((eye & oracle).sum()), int((eye & ~oracle).sum()), int((~eye & oracle).sum())] == [16, 7, 2]
