"""What befalls one process befalls all: none hangs, and the checkpoint before it is valid."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.engine.checkpoint import load_checkpoint
from diffalign.engine.shares import share
from diffalign.engine.tracking import read_metrics
from tests.processes import start

SCRIPT = Path(__file__).with_name("nan_on_one_rank.py")
RECIPE = """
pipeline: {path: zoo:shapes-sd}
adapter: {rank: 2, alpha: 2}
method: {name: reward_backprop, num_inference_steps: 2, guidance_scale: 1.0, gradient: {kind: last_k, k: 1}}
rewards: {train: [sick]}
prompts: {train: "prompts:shapes-train", validation: "prompts:shapes-validation", test: "prompts:shapes-test"}
evaluation: {num_validation_prompts: 2, num_test_prompts: 2}
num_prompts_per_step: 2
max_train_steps: 5
checkpointing_steps: 1
output_dir: OUT
"""


@pytest.mark.slow
def test_a_gradient_that_is_nan_on_one_rank_stops_both(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "run"
    for rank, (status, errors) in enumerate(start(SCRIPT, [recipe, out], world=2)):
        assert status == 1, errors
        assert "step 3: the gradient is not finite" in errors, f"rank {rank}: {errors}"
        assert "Traceback" not in errors
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [0, 1, 2]
    step, tree = load_checkpoint(out / "checkpoints")
    assert step == 2
    assert all(p.isfinite().all() for p in tree["adapter"].values())


def test_shares_are_equally_long_and_hold_every_item():
    assert [share("abcde", rank, 2) for rank in range(2)] == [["a", "b", "c"], ["d", "e", "a"]]
    assert [share("ab", rank, 3) for rank in range(3)] == [["a"], ["b"], ["a"]]


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_an_evaluation_by_two_processes_is_that_of_one(tmp_path):
    script = Path(__file__).with_name("shared_evaluation.py")
    (tmp_path / "two").mkdir()
    for status, errors in [*start(script, [tmp_path], world=1), *start(script, [tmp_path / "two"], world=2)]:
        assert status == 0, errors
    one = load_file(tmp_path / "0.safetensors")
    for rank in range(2):
        both = load_file(tmp_path / "two" / f"{rank}.safetensors")
        assert (both["images"].int() - one["images"].int()).abs().max() <= 1
        torch.testing.assert_close(both["red"], one["red"], rtol=0, atol=1e-3)
        assert (one["sampled"], both["sampled"]) == (6, 8)  # one prompt fills up the second share
        assert (one["peak_memory"], both["peak_memory"]) == (100, 101)  # the most of them, not all together
