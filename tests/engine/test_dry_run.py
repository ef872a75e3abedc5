"""A recipe of a model that is not on this machine, tried out offline on tiny random weights of its class."""

import re
from pathlib import Path

import pytest
from diffusers import PNDMScheduler

from diffalign.config import PipelineConfig, load_recipe
from diffalign.engine import dry_run as module
from diffalign.engine.dry_run import dry_run
from diffalign.engine.stand_ins import BUILDERS, KNOWN, missing_reward, write_pipeline
from diffalign.policies import POLICIES, Policy
from diffalign.recipe_problems import RecipeError

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The README's, for Stable Diffusion 1.5 and PickScore, of few sampling steps; temporary folders go to tmp_path."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "my").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "my" / f"{split}.txt").write_text("a horse on the moon\na red cube\na third\n")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return load_recipe(tmp_path / "recipe.yaml", ["method.num_inference_steps=3", f"output_dir={tmp_path / 'run'}"])


def test_the_readmes_recipe_runs_offline_and_leaves_nothing(recipe, tmp_path):
    said = dry_run(recipe)
    assert "on a tiny random StableDiffusionPipeline: 2 steps" in said
    for name in ("the pipeline's scheduler", "pickscore", "clip-vit-l-14"):
        assert f"{name} (not on this machine" in said
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_every_family_has_a_tiny_pipeline_that_loads(tmp_path):
    classes = {POLICIES.get(name).pipeline_class for name in POLICIES.names()}
    assert classes == set(BUILDERS) == set(KNOWN)
    for name in ("StableDiffusion3Pipeline", "SanaPipeline"):
        config = PipelineConfig(path=KNOWN[name][0])
        assert write_pipeline(config, tmp_path / name) == (name, False)
        assert type(Policy.from_pretrained(tmp_path / name).pipe).__name__ == name


def test_the_scheduler_is_the_recipes_own_where_it_is_on_disk(tmp_path):
    write_pipeline(PipelineConfig(path=KNOWN["StableDiffusionPipeline"][0]), tmp_path / "a")
    PNDMScheduler(skip_prk_steps=True, steps_offset=7).save_pretrained(tmp_path / "a" / "scheduler")
    index = tmp_path / "a" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    assert write_pipeline(PipelineConfig(path=str(tmp_path / "a")), tmp_path / "b") == ("StableDiffusionPipeline", True)
    assert PNDMScheduler.from_pretrained(tmp_path / "b" / "scheduler").config.steps_offset == 7


def test_a_class_that_nothing_says_or_nothing_builds_is_refused_in_words(tmp_path):
    with pytest.raises(RecipeError, match=r"someone/model.*\n.*nothing says its class.*\n?.*model_index.json"):
        write_pipeline(PipelineConfig(path="someone/model"), tmp_path / "a")
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(RecipeError, match="is a KandinskyPipeline, of which there is no tiny one"):
        write_pipeline(PipelineConfig(path=str(tmp_path)), tmp_path / "a")


def test_rewards_on_this_machine_are_the_real_ones():
    assert missing_reward("shapes-clip") is None
    assert missing_reward("shapes-oracle") is None
    missing = missing_reward("pickscore")
    assert missing is not None
    assert missing.type == "pickscore"
