"""Reward recipes: what ships is well formed, what is wrong is refused with its file, key and value."""

from pathlib import Path

import pytest
import torch

from diffalign import rewards
from diffalign.registry import UnknownName
from diffalign.rewards.recipe import recipe_path

RECIPE = {"name": "mine", "type": "clip", "path": "models/tiny", "scale": "cosine", "licence": "MIT", "source": "me"}


def write(folder: Path, **changes) -> Path:
    path = folder / "mine.yaml"
    tree = {key: value for key, value in (RECIPE | changes).items() if value is not None}
    path.write_text("".join(f"{key}: {value}\n" for key, value in tree.items()))
    return path


def test_shipped_recipes_are_complete():
    shipped = rewards.shipped_recipes()
    assert {"shapes-clip", "shapes-preference", "clip-vit-l-14", "pickscore"} <= set(shipped)
    for name, path in shipped.items():
        recipe = rewards.read_recipe(path)
        assert recipe.name == name
        assert recipe.summary
        assert recipe.licence
        assert recipe.size
        assert recipe.needs is not None
        assert recipe.differentiable is not None


def test_the_file_of_a_recipe_is_found_by_name_and_by_path(tmp_path):
    shipped = rewards.shipped_recipes()["pickscore"]
    assert recipe_path("pickscore", tmp_path) == recipe_path("zoo:PickScore", tmp_path) == shipped
    assert recipe_path("parts/mine.yaml", tmp_path) == tmp_path / "parts" / "mine.yaml"
    assert recipe_path(tmp_path / "mine.yml", Path("elsewhere")) == tmp_path / "mine.yml"
    assert recipe_path("shapes-oracle", tmp_path) is None


def test_a_recipe_file_names_its_folder_relative_to_itself(tiny_clip, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_clip)
    reward = rewards.load(write(tmp_path))
    assert reward.name == "mine"
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cosine = reward(image, ["a red circle"])
    assert list(cosine.parts) == ["mine"]
    preference = rewards.load(write(tmp_path, type="pickscore"))
    scale = preference.encoder.logit_scale
    torch.testing.assert_close(preference(image, ["a red circle"]).value, cosine.value * scale)


def test_a_recipe_may_be_a_mapping(tiny_clip):
    reward = rewards.load(RECIPE | {"path": str(tiny_clip)})
    assert type(reward).__name__ == "CLIPReward"
    with pytest.raises(ValueError, match=r"licence: Field required"):
        rewards.load({key: value for key, value in RECIPE.items() if key != "licence"})


@pytest.mark.parametrize(
    ("fact", "value"), [("token_limit", 77), ("differentiable", "false"), ("needs", "[prompt, source]")]
)
def test_what_a_recipe_says_is_compared_with_the_reward(tiny_clip, tmp_path, fact, value):
    path = write(tmp_path, path=tiny_clip, **{fact: value})
    with pytest.raises(ValueError, match=f"the recipe of mine says {fact}: .* and the reward has .*: correct it"):
        rewards.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"typ": "clip"}, "typ: Extra inputs"),
        ({"scale": None}, "scale: Field required"),
        ({"type": "clipp"}, r"unknown reward type 'clipp': did you mean 'clip'"),
        ({"path": "nowhere"}, "neither a folder"),
        ({"path": "../../etc"}, "neither a folder"),
    ],
)
def test_wrong_recipes_name_key_and_value(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        rewards.load(write(tmp_path, **changes))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        rewards.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="is a mapping"):
        rewards.load(tmp_path / "list.yaml")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(ValueError, match="twice"):
        rewards.load(tmp_path / "twice.yaml")


def test_unknown_names_list_recipes_and_registered_rewards(monkeypatch):
    monkeypatch.setattr(rewards.REWARDS, "_things", dict(rewards.REWARDS._things))
    rewards.REWARDS.register("brightness")(
        lambda: rewards.as_reward(lambda i, p, m: i.mean((1, 2, 3)), name="brightness")
    )
    assert "brightness" in rewards.reward_names()
    assert rewards.load("Brightness").name == "brightness"
    with pytest.raises(UnknownName, match="did you mean 'pickscore'"):
        rewards.load("pikscore")
    with pytest.raises(UnknownName, match=r"brightness.*shapes-clip"):
        rewards.load("nothing-like-it")
