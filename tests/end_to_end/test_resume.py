"""A run that is killed at any moment and resumed ends as the run that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.engine.state import load_tree

HERE = Path(__file__).parent
CLOCKS = {"seconds", "samples_per_s", "peak_memory_bytes"}
RECIPE = """
pipeline: {path: zoo:shapes-sd}
adapter: {rank: 2, alpha: 2}
method:
  {name: reward_backprop, num_inference_steps: 3, guidance_scale: 3.0, gradient: {kind: last_k, k: 2}, kl_weight: 0.1}
rewards: {train: [shapes-clip], heldout: [shapes-preference, shapes-oracle]}
prompts: {train: "prompts:shapes-train", validation: "prompts:shapes-validation", test: "prompts:shapes-test"}
evaluation: {num_validation_prompts: 2, num_test_prompts: 2, validation_steps: 2}
num_prompts_per_step: 2
max_train_steps: 4
checkpointing_steps: 2
output_dir: runs/resume
"""
# The first step has too few rewards of a prompt for its own statistic; two epochs, so that some updates are off-policy.
DDPO = """
extends: recipe.yaml
method:
  {name: ddpo, num_inference_steps: 3, guidance_scale: 3.0, advantage: history, history_size: 10, history_least: 6,
   num_inner_epochs: 2, num_minibatches: 2, clip_range: 1.0e-2, kl_weight: 0.1, timestep_fraction: 0.7}
prompts: {train: train.jsonl}
group_size: 4
learning_rate: 1.0e-3
output_dir: runs/resume
"""
# The old policy, which draws the samples, is neither the first one nor that of the checkpoint.
NFT = """
extends: recipe.yaml
method:
  {name: nft, num_inference_steps: 3, guidance_scale: 3.0, timesteps_per_sample: 2, num_inner_epochs: 2,
   num_minibatches: 2, old_decay_rate: 0.05, kl_weight: 0.1}
prompts: {train: train.jsonl}
group_size: 4
learning_rate: 1.0e-3
ema_decay: 0.9
output_dir: runs/resume
"""
PROMPTS = [{"prompt": "a red circle", "id": 7}, {"prompt": "a blue square above a green star", "id": "the other"}]


def killed_runs(folder, *options, extending=None):
    """The folder of a run that was let be, and of those that were killed and resumed."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    if extending:
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
        recipe = folder / "extending.yaml"
        recipe.write_text(extending)
    command = [sys.executable, str(HERE / "killed_runs.py"), *options, str(folder), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return folder


def contents(run):
    """What a run leaves that no clock has touched."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        # By tensor: safetensors writes the keys of its metadata in any order.
        "lora": {k: v.tolist() for k, v in load_file(run / "lora/pytorch_lora_weights.safetensors").items()},
        "state": (run / "checkpoints/step-000004/tensors.safetensors").read_bytes(),
        "numbers": (run / "checkpoints/step-000004/state.json").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows],
        "figures": summary["figures"],
        "pictures": {p.name: p.read_bytes() for p in sorted((run / "samples").rglob("*.png"))},
    }


def assert_bit_equal(resumed, whole):
    resumed, whole = contents(resumed), contents(whole)
    assert len(whole["metrics"]) == 5  # validation before training, and four steps
    for part in whole:
        assert resumed[part] == whole[part], part


def assert_resumed_from(folder, *moments, extending=None):
    runs = killed_runs(folder, "--at", ",".join(moments), extending=extending)
    for moment in moments:
        assert_bit_equal(runs / moment, runs / "whole")
    for run in runs.glob("*/checkpoints"):  # nothing of a killed save is left
        assert sorted(path.name for path in run.iterdir()) == ["step-000002", "step-000004"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_a_checkpoint_is_bit_equal(tmp_path):
    assert_resumed_from(tmp_path, "rename")


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_a_run_killed_in_a_step_and_in_a_file_is_bit_equal(tmp_path):
    assert_resumed_from(tmp_path, "rollout", "backward", "save")


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_ddpo_killed_between_the_updates_of_a_step_and_in_a_checkpoint_is_bit_equal(tmp_path):
    """The samples of a step and their old policy are drawn again, and what was known of each prompt is there."""
    assert_resumed_from(tmp_path, "update", "rename", extending=DDPO)
    first, last = (
        load_tree(tmp_path / "whole/checkpoints" / step)["history"] for step in ("step-000002", "step-000004")
    )
    assert {name: len(rewards) for name, rewards in first.items()} == {7: 8, "the other": 8}
    assert {name: len(rewards) for name, rewards in last.items()} == {7: 10, "the other": 10}
    assert first != last
    rows = contents(tmp_path / "whole")["metrics"]
    assert all(row["ratio"] != 1 and row["grad_norm"] > 0 for row in rows if "ratio" in row)


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_nft_killed_between_the_updates_of_a_step_and_in_a_checkpoint_is_bit_equal(tmp_path):
    """The samples of a step are drawn again by the old policy, which the checkpoint has."""
    assert_resumed_from(tmp_path, "update", "rename", extending=NFT)
    first, last = (load_tree(tmp_path / "whole/checkpoints" / step) for step in ("step-000002", "step-000004"))
    for name, tensor in first["old"].items():
        assert not torch.equal(tensor, first["adapter"][name])
        assert not torch.equal(tensor, last["old"][name])


@pytest.mark.verify
@pytest.mark.timeout(3000)
def test_a_run_killed_at_twenty_random_moments_is_bit_equal(tmp_path):
    runs = killed_runs(tmp_path, "--random", "20")
    for number in range(20):
        assert_bit_equal(runs / f"kill-{number:02d}", runs / "whole")
