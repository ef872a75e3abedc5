"""One short run of the shipped pipelines from recipe to report, and what plain diffusers makes of what it leaves."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from diffalign import media
from diffalign.config import load_recipe
from diffalign.engine.run import train

RECIPE = """
pipeline: {{path: zoo:{name}}}
adapter: {{rank: 2, alpha: 4}}
method: {{name: reward_backprop, num_inference_steps: 4, guidance_scale: 3.0, gradient: {{kind: last_k, k: 1}}}}
rewards: {{train: [shapes-clip], heldout: [shapes-preference, shapes-oracle]}}
prompts: {{train: "prompts:shapes-train", validation: "prompts:shapes-validation", test: "prompts:shapes-test"}}
evaluation:
  {{num_validation_prompts: 4, num_test_prompts: 4, num_images_per_prompt: 2, validation_steps: 2, batch_size: 8}}
num_prompts_per_step: 4
learning_rate: 1.0e-2
max_train_steps: 2
checkpointing_steps: 2
output_dir: OUT
report_to: [tensorboard]
"""


@pytest.fixture(scope="module", params=["shapes-sd", pytest.param("shapes-sd3", marks=pytest.mark.verify)])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(RECIPE.format(name=request.param))
    recipe = load_recipe(folder / "recipe.yaml", [f"output_dir={folder / 'run'}"])
    assert train(recipe) == folder / "run" / "report.html"
    return folder, recipe


def test_the_run_folder_is_whole(finished):
    run = finished[0] / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"heldout/shapes-oracle", "heldout/shapes-preference", "validation/shapes-clip", "diversity"} <= rows[
        0
    ].keys()
    assert {"loss", "reward", "reward/shapes-clip", "grad_norm", "nfe", "samples_per_s"} <= rows[1].keys()
    # Four images, four steps, guidance doubles them.
    assert rows[1]["nfe"] == 4 * 4 * 2
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000002"}
    assert any((run / "tensorboard").rglob("events*"))
    names = {f["name"]: f for f in json.loads((run / "summary.json").read_text())["figures"]}
    assert set(names) == {"shapes-clip", "shapes-preference", "shapes-oracle", "diversity within a prompt"}
    assert names["shapes-clip"]["n"] == 4


def test_plain_diffusers_draws_the_images_of_the_report(finished):
    """A fresh pipeline with `load_lora_weights`, given the noise of the run, in the run's own batch."""
    from diffusers import DiffusionPipeline

    from diffalign.data import read_prompts
    from diffalign.noise import normal
    from diffalign.registry import locate

    folder, recipe = finished
    prompts = read_prompts(recipe.prompts.test)[:4]
    pipe = DiffusionPipeline.from_pretrained(locate(recipe.pipeline.path))
    pipe.load_lora_weights(folder / "run" / "lora")
    pipe.set_progress_bar_config(disable=True)
    shape = (pipe.vae.config.latent_channels, 16, 16)
    noise = normal(shape, seed=0, purpose="initial", rows=[(p.id, i) for p in prompts for i in range(2)])
    kept = load_file(folder / "run/samples/test/latents.safetensors")
    assert torch.equal(kept["00002"], noise[2])
    images = pipe(
        [p.text for p in prompts for _ in range(2)], latents=noise, num_inference_steps=4, guidance_scale=3.0
    ).images
    for row in (0, 2, 4, 6):
        shown = media.open_image(folder / f"run/samples/test/{row:05d}-tuned.png")
        # Guidance is combined in another order of operations: one level of 255 at the most.
        difference = torch.tensor(list(images[row].tobytes())).int() - torch.tensor(list(shown.tobytes())).int()
        assert difference.abs().max() <= 1


def test_diffalign_sample_draws_the_images_of_the_report(finished):
    folder, _ = finished
    out = folder / "samples"
    command = [
        sys.executable,
        "-m",
        "diffalign",
        "sample",
        str(folder / "recipe.yaml"),
        "--lora",
        str(folder / "run/lora"),
    ]
    prompts = folder / "test.jsonl"
    from diffalign.registry import resolve_data

    lines = resolve_data("prompts:shapes-test", folder).read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:4]))
    done = subprocess.run(
        [*command, "--prompts", str(prompts), "--out", str(out)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for number in range(4):
        ours = media.open_image(out / f"{number:05d}-00.png")
        shown = media.open_image(folder / f"run/samples/test/{2 * number:05d}-tuned.png")
        assert ours.tobytes() == shown.tobytes()


def test_a_finished_run_is_not_overwritten(finished):
    recipe = finished[1]
    with pytest.raises(FileExistsError, match="resume_from_checkpoint=latest"):
        train(recipe)
