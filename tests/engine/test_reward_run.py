"""A recipe of a noise-aware reward, from samples to card, on the shipped pipeline."""

import json

import pytest
import torch

from diffalign.config import load_recipe
from diffalign.engine import reward_run, run
from diffalign.engine.run import Interrupted
from diffalign.engine.state import load_tree
from diffalign.policies import Policy
from diffalign.rewards.noisy import NoisyReward

RECIPE = """
pipeline: {path: zoo:shapes-sd3, max_sequence_length: 16}
method: {name: noisy_reward, num_inference_steps: 2, guidance_scale: 1.0, blocks: 1, hidden: 8}
rewards: {train: [{name: shapes-preference, weight: 2.0}, jpeg-size]}
prompts: {train: PROMPTS, validation: PROMPTS, test: PROMPTS}
evaluation: {num_validation_prompts: 2, num_test_prompts: 2, validation_steps: 2, batch_size: 4}
group_size: 2
num_prompts_per_step: 2
learning_rate: 1.0e-3
max_train_steps: 3
checkpointing_steps: 2
output_dir: OUT
"""


@pytest.fixture(scope="module")
def policy():
    found = Policy.from_pretrained("zoo:shapes-sd3")
    found.set_max_sequence_length(16)
    return found


def recipe(folder, *overrides):
    (folder / "prompts.txt").write_text("a red circle\na small blue star\na green square\n")
    (folder / "recipe.yaml").write_text(RECIPE.replace("PROMPTS", str(folder / "prompts.txt")))
    return load_recipe(folder / "recipe.yaml", [f"output_dir={folder / 'run'}", *overrides])


def test_a_recipe_leaves_a_reward_its_metrics_and_a_card(policy, tmp_path):
    """Of the moving average of its heads."""
    card = reward_run.train_reward(recipe(tmp_path, "ema_decay=0.9"), policy)
    run = tmp_path / "run"
    assert card == run / "reward" / "README.md"
    assert "| shapes-preference | " in card.read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"validation/jpeg-size@0", "validation/shapes-preference@0.4"} <= rows[0].keys() & rows[2].keys()
    assert {"loss", "agreement/jpeg-size", "grad_norm", "nfe"} <= rows[1].keys()
    assert rows[1]["nfe"] == 2 * 2
    reward = NoisyReward.load(run / "reward", policy)
    assert reward.weights == {"shapes-preference": 2.0, "jpeg-size": 1.0}
    state = load_tree(run / "checkpoints" / "step-000003")
    averages = dict(zip(dict(reward.heads.named_parameters()), state["ema"]["parameters"], strict=True))
    assert all(torch.equal(reward.heads.get_parameter(name), average) for name, average in averages.items())
    assert not all(torch.equal(state["heads"][name], average) for name, average in averages.items())
    assert set(json.loads((run / "reward" / "figures.json").read_text())) == set(reward.objectives)


def test_a_run_that_was_stopped_while_drawing_and_while_learning_ends_as_an_unbroken_one(policy, tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    reward_run.train_reward(recipe(tmp_path / "whole"), policy)

    class Now:
        """Asks for the end at the `after`-th look."""

        def __init__(self, after):
            self.looks = after

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def __bool__(self):
            self.looks -= 1
            return self.looks < 0

    monkeypatch.setattr(reward_run, "deferred_interrupt", lambda: Now(0))
    with pytest.raises(Interrupted, match="stopped after 1 of 2 parts of the train samples"):
        reward_run.train_reward(recipe(tmp_path / "stopped"), policy)
    monkeypatch.setattr(reward_run, "deferred_interrupt", lambda: Now(9))  # the splits
    monkeypatch.setattr(run, "deferred_interrupt", lambda: Now(1))  # the training
    with pytest.raises(Interrupted, match="stopped after step 1 of 3"):
        reward_run.train_reward(recipe(tmp_path / "stopped", "resume_from_checkpoint=latest"), policy)
    monkeypatch.undo()
    reward_run.train_reward(recipe(tmp_path / "stopped", "resume_from_checkpoint=latest"), policy)
    whole, stopped = (NoisyReward.load(tmp_path / name / "run" / "reward", policy) for name in ("whole", "stopped"))
    for name, tensor in whole.heads.state_dict().items():
        assert torch.equal(tensor, stopped.heads.state_dict()[name]), name


def test_what_cannot_be_chosen_between_is_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="group_size = 1: a choice is between images of a prompt"):
        reward_run.train_reward(recipe(tmp_path, "group_size=1"), policy)


def test_what_holds_a_policy_is_refused_before_anything_is_drawn(policy, tmp_path):
    with pytest.raises(ValueError, match="weight_l2 holds a policy near its base, and noisy_reward trains none"):
        reward_run.train_reward(recipe(tmp_path, "weight_l2=0.1"), policy)
    assert not (tmp_path / "run").exists()
