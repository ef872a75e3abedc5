"""Rewards made of rewards in YAML: each type builds its combination, nested, from names, files and recipes in place."""

import pytest
import torch
import yaml

from diffalign import rewards
from diffalign.rewards import Combination

CARD = {"scale": "none", "licence": "none", "source": "a test"}
IMAGES = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one", "one", "two", "two"]


@pytest.fixture(autouse=True)
def channels(monkeypatch):
    """Rewards red, green and blue: the means of the channels."""
    monkeypatch.setattr(rewards.REWARDS, "_things", dict(rewards.REWARDS._things))
    for channel, name in enumerate(("red", "green", "blue")):
        rewards.REWARDS.register(name)(
            lambda channel=channel, name=name: rewards.as_reward(
                lambda images, prompts, metadata: images[:, channel].mean((1, 2)), name=name
            )
        )


def values(tree, metadata=None):
    return rewards.load(CARD | {"name": "mix"} | tree)(IMAGES, PROMPTS, metadata).value


RED, GREEN, BLUE = IMAGES.mean((2, 3)).unbind(1)
STACK = torch.stack([RED, GREEN, BLUE])
ALL = ["red", "green", "blue"]
WEIGHTED = [{"reward": "red", "weight": 2.0}, "green"]
HARMONIC = 3 / (2 / (RED + 1e-8) + 1 / (GREEN + 1e-8))
TAUS = {"red": 0.4, "green": {"one": 0.5, "two": 0.6}}
TAU_GREEN = torch.tensor([0.5, 0.5, 0.6, 0.6])
LOG_SIGMOID = 2 * torch.nn.functional.logsigmoid((RED - 0.4) / 0.1) + torch.nn.functional.logsigmoid(GREEN - TAU_GREEN)
MOMENTS = {"red": {"mean": 0.5, "std": 0.1}, "green": {"mean": 0.4, "std": 0.2}}
REFERENCES = {"one": [0.2, 0.6], "two": 0.5}
PAR = torch.stack([torch.sigmoid(RED - r) for r in (0.2, 0.6)]).mean(0)
# of two samples each is half their difference from the mean, and the standard deviation that over the root of 2
SIGNS = torch.stack([(x[[0, 0, 2, 2]] - x[[1, 1, 3, 3]]).sign() for x in (RED, GREEN)]) * torch.tensor([1, -1, 1, -1])
GROUP_STANDARDISED = (2 * SIGNS[0] + SIGNS[1]) / 2**0.5
CASES = {
    "weighted_sum": ({"terms": WEIGHTED}, 2 * RED + GREEN),
    "standardised_sum": ({"terms": WEIGHTED, "statistics": MOMENTS}, 2 * (RED - 0.5) / 0.1 + (GREEN - 0.4) / 0.2),
    "group_standardised": ({"terms": WEIGHTED}, GROUP_STANDARDISED),
    "harmonic": ({"terms": WEIGHTED}, HARMONIC),
    "log_sigmoid": ({"terms": WEIGHTED, "thresholds": TAUS, "scales": {"red": 0.1}}, LOG_SIGMOID),
    "mean": ({"members": ALL}, STACK.mean(0)),
    "worst_case": ({"members": ALL}, STACK.amin(0)),
    "uncertainty_weighted": ({"members": ALL, "penalty": 0.5}, STACK.mean(0) - 0.5 * STACK.var(0, correction=0)),
    "soft_min": ({"members": ALL, "temperature": 0.1}, -0.1 * ((-STACK / 0.1).exp().mean(0)).log()),
    "hinge": ({"reward": "red", "target": 0.5}, RED.clamp(max=0.5)),
    "gate": (
        {"reward": "red", "where": "green", "at_least": 0.5, "otherwise": -1.0},
        torch.where(GREEN >= 0.5, RED, -1.0),
    ),
    "par": ({"reward": "red", "references": REFERENCES}, torch.cat([PAR[:2], torch.sigmoid(RED - 0.5)[2:]])),
    "lagrangian": ({"objective": "red", "constraints": [{"reward": "green", "at_least": 0.6}], "rate": 0.1}, RED),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_type_builds_its_combination(kind):
    keys, expected = CASES[kind]
    torch.testing.assert_close(values({"type": kind} | keys), expected, rtol=1e-5, atol=1e-6)


def test_the_rest_of_the_types_are_built_too():
    rank = rewards.load(CARD | {"name": "rank", "type": "pareto_rank", "members": ["red", "green"]})
    assert rank.groupwise
    assert set(rank(IMAGES, PROMPTS).value.tolist()) <= {0.0, 0.5, 1.0}
    certain = rewards.load(
        CARD
        | {
            "name": "sure",
            "type": "inverse_variance",
            "members": [
                CARD | {"name": "a", "type": "mean", "members": ["red", "green"]},
                CARD | {"name": "b", "type": "mean", "members": ["green", "blue"]},
            ],
        }
    )
    a, b = (RED + GREEN) / 2, (GREEN + BLUE) / 2
    u, v = ((RED - GREEN) / 2).square(), ((GREEN - BLUE) / 2).square()
    torch.testing.assert_close(certain(IMAGES, PROMPTS).value, (a / u + b / v) / (1 / u + 1 / v), rtol=1e-4, atol=1e-5)


def test_every_type_of_combination_has_a_case():
    kinds = {
        name for name in rewards.REWARD_TYPES.names() if "combinations" in rewards.REWARD_TYPES.get(name).__module__
    }
    assert kinds == {*CASES, "pareto_rank", "inverse_variance"}


def test_parts_are_names_files_and_recipes_in_place_and_one_reward_is_built_once(tmp_path):
    inner = CARD | {"name": "inner", "type": "worst_case", "members": ["red", "blue"]}
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "inner.yaml").write_text(yaml.safe_dump(inner))
    outer = CARD | {"name": "outer", "type": "gate", "reward": "parts/inner.yaml", "at_least": 0.2, "otherwise": 0.0}
    outer |= {"where": CARD | {"name": "both", "type": "mean", "members": ["red", "parts/inner.yaml"]}}
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump(outer))
    reward = rewards.load(tmp_path / "outer.yaml")
    score = reward(IMAGES, PROMPTS)
    worst = torch.minimum(RED, BLUE)
    torch.testing.assert_close(score.value, torch.where((RED + worst) / 2 >= 0.2, worst, 0.0))
    leaves = [part for part in reward.walk() if not isinstance(part, Combination)]
    assert len({id(part) for part in leaves if part.name == "red"}) == 1
    assert {"red", "blue", "inner", "both"} <= set(score.parts)


def test_a_reward_made_of_itself_is_refused(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(yaml.safe_dump(CARD | {"name": "loop", "type": "mean", "members": ["red", "loop.yaml"]}))
    with pytest.raises(ValueError, match="made of itself"):
        rewards.load(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "mean", "members": []}, "members: .*at least 1"),
        ({"type": "mean", "members": ["rde"]}, "did you mean 'red'"),
        ({"type": "hinge", "reward": "red"}, "target: Field required"),
        ({"type": "soft_min", "members": ["red"], "temperature": 0}, "temperature: .*greater than 0"),
        ({"type": "standardised_sum", "terms": ["red"], "statistics": {}}, "red"),
        ({"type": "weighted_sum", "terms": [{"reward": "red", "wieght": 2}]}, "wieght: Extra inputs"),
    ],
)
def test_wrong_combinations_name_key_and_value(keys, words):
    with pytest.raises(ValueError, match=words):
        values(keys)
