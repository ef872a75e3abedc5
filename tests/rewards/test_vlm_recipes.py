"""Recipes of vision-language rewards, as YAML has them."""

import pytest
import torch

import diffalign.rewards.vlm.recipes  # noqa: F401  registers the types
from diffalign import rewards
from diffalign.rewards.vlm import GoalBaseline, JudgeServer, PairwiseJudge, Rating, YesLogit

FACTS = {"name": "mine", "scale": "0 to 1", "licence": "MIT", "source": "me"}
SERVER = {"base_url": "http://localhost:8000/v1", "model": "qwen", "api_key_env": "MY_JUDGE_KEY", "read": "text"}


@pytest.mark.parametrize(
    ("kind", "reward"), [("yes_logit", YesLogit), ("vlm_rating", Rating), ("pairwise_judge", PairwiseJudge)]
)
def test_a_judge_behind_a_server(kind, reward, monkeypatch, tmp_path):
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_JUDGE_KEY", "secret")
    recipe = FACTS | {"type": kind, "principle": "Be strict.", "server": SERVER | {"cache": str(tmp_path)}}
    found = rewards.load(recipe)
    assert type(found) is reward
    assert isinstance(found.judge, JudgeServer)
    assert (found.name, found.principle, found.judge.model) == ("mine", "Be strict.", "qwen")
    assert found.judge.cache.folder == tmp_path
    assert not found.judge.gives_probabilities
    assert found.groupwise == (kind == "pairwise_judge")
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(ValueError, match="MY_JUDGE_KEY"):
        rewards.load(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give one of the two"),
        ({"path": "a/b", "server": SERVER}, "give one of the two"),
        ({"server": SERVER | {"api_key": "secret"}}, "api_key: Extra inputs"),
        ({"server": SERVER | {"base_url": "localhost"}}, "should match pattern"),
        ({"path": "nowhere"}, "neither a folder"),
    ],
)
def test_what_is_wrong_is_told(changes, words):
    with pytest.raises(ValueError, match=words):
        rewards.load(FACTS | {"type": "yes_logit"} | changes)


def test_goal_baseline_from_a_recipe(tiny_clip):
    recipe = FACTS | {"type": "goal_baseline", "path": str(tiny_clip), "baseline": "a circle", "alpha": 0.4}
    reward = rewards.load(recipe | {"goal": "a red circle", "needs": [], "differentiable": True})
    assert isinstance(reward, GoalBaseline)
    assert reward(torch.rand(2, 3, 32, 32), ["x", "y"]).valid.all()
