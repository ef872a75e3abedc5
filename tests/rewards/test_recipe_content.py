"""Recipes of rewards that look at content: those that ship, with tiny networks in the place of theirs."""

import pytest
import torch

from diffalign import media, rewards
from diffalign.registry import data_root
from diffalign.rewards import recipe_content  # noqa: F401
from tests.rewards.pictures import pictures
from tests.rewards.tiny_vision import write_depth_anything, write_dino, write_mask2former, write_segformer

PLACES = {
    "dino-subject": {"path": write_dino},
    "edge-consistency": {},
    "depth-consistency": {"path": write_depth_anything},
    "segmentation-consistency": {"path": write_segformer},
    "geneval": {"detector": write_mask2former},
}


@pytest.mark.parametrize("name", PLACES)
def test_a_shipped_recipe_scores(name, tiny_clip, tmp_path):
    card = rewards.read_recipe(data_root("rewards") / f"{name}.yaml")
    assert card.name == name
    assert card.summary
    folders = {key: str(write(tmp_path / key)) for key, write in PLACES[name].items()}
    reward = rewards.load(card.model_dump() | folders | ({"clip": str(tiny_clip)} if name == "geneval" else {}))
    images = media.from_pil(list(pictures(2, 40, 50)))
    maps = {"reference": images[0], "edges": images[0], "depth": images[0]}
    maps |= {"segmentation": torch.ones(8, 8, dtype=torch.long), "include": [{"class": "dog", "count": 1}]}
    score = reward(images, ["", ""], [{need: maps[need] for need in reward.needs}] * 2)
    assert score.valid.all(), score.reasons
    assert list(score.parts) == [name]
