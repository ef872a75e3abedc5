"""Pairs from a policy and a reward, and a run that learns from them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import sample
from diffalign.config import EvaluationConfig, RecipeError, load_recipe
from diffalign.data import Prompt, read_pairs, write_pairs
from diffalign.engine.evaluate import sample_images
from diffalign.engine.pairs import LeftOut, draw_pairs
from diffalign.engine.run import train
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from diffalign.rewards import as_reward

PROMPTS = [Prompt(text, i) for i, text in enumerate(["a b", "tie", "c d", "none", "one", "e f"])]
SETTINGS = EvaluationConfig(num_inference_steps=2, guidance_scale=1.0, num_images_per_prompt=3, batch_size=6)


def redness(images, prompts, metadata):
    """Red less blue; of some prompts equal, not there, or there once."""
    value = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
    value = torch.where(torch.tensor([p == "tie" for p in prompts]), 0.5, value)
    first = torch.tensor([p == "one" and p not in prompts[:i] for i, p in enumerate(prompts)])
    gone = torch.tensor([p in ("none", "one") for p in prompts]) & ~first
    return value.masked_fill(gone, torch.nan)


def test_the_best_stands_against_the_worst_and_the_rest_is_counted():
    policy, left_out = Policy.wrap(tiny_sd()), LeftOut()
    found = list(draw_pairs(policy, PROMPTS, as_reward(redness), SETTINGS, 7, left_out))
    assert (left_out.ties, left_out.failed) == (1, 2)
    assert [pair.prompt.id for pair in found] == [0, 2, 5]
    drawn = sample_images(policy, PROMPTS, seed=7, **SETTINGS.sampling())
    for pair in found:
        images = drawn.images[3 * pair.prompt.id : 3 * pair.prompt.id + 3]
        values = redness(images.float() / 255, [pair.prompt.text] * 3, [{}] * 3)
        both = sorted({int(values.argmax()), int(values.argmin())})
        assert torch.equal(pair.images, images[both]), "in the order in which they were drawn"
        assert pair.rewards == pytest.approx(values[both].tolist(), abs=1e-6)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe over a file of pairs that a tiny policy drew."""
    monkeypatch.chdir(tmp_path)
    prompts = [Prompt(text, i) for i, text in enumerate(["a b", "c d", "e f"])]
    write_pairs(
        "pairs.parquet", draw_pairs(Policy.wrap(tiny_sd()), prompts, as_reward(redness), SETTINGS, 0, LeftOut())
    )
    (tmp_path / "prompts.txt").write_text("a b\nc d\n")
    (tmp_path / "recipe.yaml").write_text("""
pipeline: {path: zoo:shapes-sd}
adapter: {rank: 2}
method: {name: diffusion_dpo, pairs: pairs.parquet, beta: 100}
rewards: {heldout: [jpeg-size]}
prompts: {validation: prompts.txt, test: prompts.txt}
num_prompts_per_step: 2
max_train_steps: 2
checkpointing_steps: 1
evaluation: {num_inference_steps: 2, validation_steps: 1}
output_dir: run
""")
    return tmp_path


def test_a_run_learns_from_pairs_and_reports(recipe):
    report = train(load_recipe("recipe.yaml"), Policy.wrap(tiny_sd()))
    rows = [json.loads(line) for line in (recipe / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss"] == pytest.approx(0.6931472)
    assert rows[1]["nfe"] == 8
    assert all("heldout/jpeg-size" in row and "reward" not in row for row in rows)
    assert rows[2]["heldout/jpeg-size"] != rows[0]["heldout/jpeg-size"]
    page = report.read_text()
    assert "2 steps of 2 pairs" in page
    assert "trained on" not in page
    (figure,) = json.loads((recipe / "run" / "summary.json").read_text())["figures"]
    assert figure["kind"] == "heldout"


def test_a_run_that_goes_on_tells_what_is_set_otherwise(recipe, caplog):
    """Each setting with both its values; but where nothing that matters differs, nothing."""
    train(load_recipe("recipe.yaml", ["max_train_steps=1"]), Policy.wrap(tiny_sd()))
    on = ["resume_from_checkpoint=latest"]
    train(load_recipe("recipe.yaml", on), Policy.wrap(tiny_sd()))
    assert "other settings" not in caplog.text
    changed = ["learning_rate=3e-4", "method.beta=200", "max_train_steps=3"]
    train(load_recipe("recipe.yaml", [*on, *changed]), Policy.wrap(tiny_sd()))
    assert "before: learning_rate was 0.001 and is 0.0003; method.beta was 100.0 and is 200.0\n" in caplog.text


@pytest.mark.verify
def test_a_run_that_was_stopped_goes_on_to_the_bit(recipe):
    train(load_recipe("recipe.yaml"), Policy.wrap(tiny_sd()))
    whole = load_file(recipe / "run" / "lora" / "pytorch_lora_weights.safetensors")

    stopped = load_recipe("recipe.yaml", ["max_train_steps=1", "output_dir=again"])
    train(stopped, Policy.wrap(tiny_sd()))
    on = load_recipe("recipe.yaml", ["output_dir=again", "resume_from_checkpoint=latest"])
    train(on, Policy.wrap(tiny_sd()))
    again = load_file(recipe / "again" / "lora" / "pytorch_lora_weights.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name or "lora.up" in name)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pairs": True}, "--pairs needs what chooses: add --reward NAME"),
        ({"reward": "shapes-clip"}, "--reward shapes-clip chooses pairs: add --pairs, or score the folder"),
        ({"pairs": True, "reward": "jpeg-size", "out": "pairs"}, "--out pairs should be a .parquet file"),
        ({"pairs": True, "reward": "shapes-clop"}, "did you mean shapes-clip?"),
        (
            {"pairs": True, "reward": "shapes-clip", "num_images_per_prompt": 1},
            "--num-images-per-prompt 1 leaves nothing to choose: use 2 or more",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told(tmp_path, options, told):
    given = {"pairs": False, "reward": None, "out": "pairs.parquet", "num_images_per_prompt": None} | options
    given["out"] = tmp_path / given["out"] if "out" not in options else type(tmp_path)(options["out"])
    where = {"lora": None, "prompts": "a", "seed": None, "num_inference_steps": None, "guidance_scale": None}
    with pytest.raises(RecipeError) as caught:
        sample.run("zoo:shapes-sd", **given, **where)
    assert told in " ".join(str(caught.value).split())


@pytest.mark.parametrize("source", ["zoo:shapes-sd", "shapes-sd-dpo"])
def test_the_command_writes_a_file_and_tells_what_is_left_out(tmp_path, monkeypatch, capsys, source):
    """For a recipe, too, whose own pairs are not there yet."""
    from diffalign.engine import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_policy", lambda config: Policy.wrap(tiny_sd()))
    options = {"lora": None, "prompts": "a b", "seed": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
    chosen = {"num_images_per_prompt": None, "pairs": True, "reward": "jpeg-size"}
    sample.run(source, out=tmp_path / "pairs.parquet", **options, **chosen)
    assert "1 pairs of 1 prompts, of 4 images each; 0 with equal scores and 0 with" in capsys.readouterr().out
    ((pair,), left_out) = read_pairs(tmp_path / "pairs.parquet")
    assert (pair.prompt.text, left_out) == ("a b", 0)
