"""A recipe of a model that is not on this machine, tried out offline on tiny random weights of its class."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler

from diffalign import media, rewards
from diffalign.cli import doctor
from diffalign.config import PipelineConfig, is_search, load_recipe, read_recipe
from diffalign.data import read_pairs
from diffalign.engine import dry_run as module
from diffalign.engine.dry_run import dry_run, reduced
from diffalign.engine.stand_ins import (
    BUILDERS,
    KNOWN,
    missing_reward,
    write_pipeline,
    write_random_pairs,
    write_reward,
)
from diffalign.policies import POLICIES, Policy
from diffalign.recipe_file import shipped_recipes
from diffalign.recipe_problems import RecipeError
from diffalign.recipe_references import DRAWN
from diffalign.rewards import SetCredit

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The README's, for Stable Diffusion 1.5 and PickScore, of few sampling steps; temporary folders go to tmp_path."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "my").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "my" / f"{split}.txt").write_text("".join(f"{n} horses on the moon\n" for n in range(32)))
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


def test_a_set_has_enough_samples_in_each_of_several_minibatches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_of_each = ["method.num_minibatches=2", "method.num_inference_steps=2", "group_size=2"]
    assert "The recipe ran in" in dry_run(load_recipe("shapes-sd3-dragon-frechet", two_of_each))


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


@pytest.mark.parametrize(
    ("name", "gradient"),
    [("hpsv2.1", True), ("image-reward", True), ("flow-grpo-pickscore", True), ("rpo", True), ("geneval", False)],
)
def test_a_stand_in_for_a_reward_that_is_elsewhere_has_a_gradient_where_that_has_one(name, gradient, tmp_path):
    found = rewards.load(write_reward(missing_reward(name), tmp_path / "reward"))
    assert found.name == name
    assert found.differentiable == gradient


def test_a_reward_whose_parts_are_all_here_is_not_missing(tmp_path):
    assert missing_reward("flow-grpo-compressibility") is None
    about = "scale: s\nlicence: l\nsource: s\n"
    (tmp_path / "both.yaml").write_text(
        f"name: both\ntype: weighted_sum\nterms: [shapes-clip, {{reward: near.yaml, weight: 2}}]\n{about}"
    )
    (tmp_path / "near.yaml").write_text(f"name: near\ntype: hinge\nreward: shapes-clip\ntarget: 1\n{about}")
    assert missing_reward(str(tmp_path / "both.yaml")) is None
    (tmp_path / "near.yaml").write_text(f"name: near\ntype: hinge\nreward: pickscore\ntarget: 1\n{about}")
    assert missing_reward(str(tmp_path / "both.yaml")).name == "both"


def test_pairs_that_are_not_written_yet_are_made_up_and_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe("sd15-dpo")
    with pytest.raises(RecipeError, match="has another suffix: give pairs"):
        load_recipe("sd15-dpo", ["method.pairs=nothing.txt"], absent=["method.pairs"])
    small, unchecked = reduced(load_recipe("sd15-dpo", absent=["method.pairs"]), tmp_path)
    pairs, _ = read_pairs(small.method.pairs)
    assert len(pairs) >= small.num_prompts_per_step
    assert unchecked[-1] == "the pairs data/pickapic.parquet (not on this machine: random ones stood in)"
    tried = []
    monkeypatch.setattr(module, "dry_run", lambda recipe: tried.append(recipe.method.name))
    doctor.run("sd15-dpo", [], [], dry_run=True)
    assert tried == ["diffusion_dpo"]


def test_what_few_prompts_and_a_cpu_cannot_have_is_reduced(tmp_path):
    changed = ["method.num_minibatches=8", "optimizer=adamw_8bit", "pipeline.resolution=512"]
    small, unchecked = reduced(load_recipe("sd15-ddpo", changed), tmp_path)
    assert small.num_prompts_per_step % small.method.num_minibatches == 0
    assert small.optimizer == "adamw"
    assert small.pipeline.resolution is None
    assert "adamw_8bit (there is no GPU here: adamw stood in)" in unchecked
    (tmp_path / "raft").mkdir()
    small, _ = reduced(load_recipe("sd15-raft", ["method.top_k=6"]), tmp_path / "raft")
    assert small.method.top_k < small.group_size


def test_random_weights_leave_nothing_in_a_cache(tmp_path):
    changed = [f"method.cache={tmp_path / 'cache'}"]
    small, _ = reduced(load_recipe("sd15-dpo", changed, absent=["method.pairs"]), tmp_path)
    assert small.method.cache is None


REFUSED = [
    ("sd15-ddpo", "method.num_minibatches=3", "num_minibatches = 3 does not divide the 32 prompts"),
    ("sd15-raft", "method.top_k=80", "top_k = 80 of group_size = 10 leaves none out"),
    ("sd15-dragon", "group_size=5", "group_size = 5: dragon divides"),
    ("sd15-ddpo", "prompts.train=few.txt", "num_prompts_per_step = 32 with 3 prompts"),
    ("sd15-dpo", "method.pairs=two.parquet", "num_prompts_per_step = 32 with 2 prompts"),
]


@pytest.mark.parametrize(("name", "changed", "told"), REFUSED)
def test_what_a_method_refuses_of_the_recipes_own_counts_is_refused(name, changed, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("a horse on the moon\na red cube\na third\n")
    write_random_pairs(tmp_path / "two.parquet", 2)
    with pytest.raises(ValueError, match=told):
        dry_run(load_recipe(name, [changed]))


def test_few_images_of_its_own_are_tried(tmp_path):
    media.save_png(torch.zeros(3, 8, 8), tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"file": "a.png", "prompt": "night"}\n')
    changed = [f"sft={{images: {tmp_path / 'list.jsonl'}, weight: 0.1, cache: {tmp_path / 'cache'}}}"]
    small, _ = reduced(load_recipe("sd15-ddpo", changed), tmp_path)
    assert (small.sft.batch_size, small.sft.cache) == (2, None)
    assert "The recipe ran in" in dry_run(load_recipe("sd15-ddpo", [*changed, "method.num_inference_steps=2"]))
    assert not (tmp_path / "cache").exists()


def test_images_that_are_not_drawn_yet_are_made_up_and_told(tmp_path):
    changed = ["sft={images: none.jsonl, weight: 0.1}", "method.num_inference_steps=2"]
    said = dry_run(load_recipe("sd15-ddpo", changed, absent=DRAWN))
    assert "none.jsonl (not on this machine: random ones stood in)" in said


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    changed = [f"method.cache={tmp_path / 'file'}"]
    with pytest.raises(ValueError, match=r"cache = .* is no folder"):
        reduced(load_recipe("sd15-dpo", changed, absent=["method.pairs"]), tmp_path)
    media.save_png(torch.zeros(3, 8, 8), tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"file": "a.png", "prompt": "night"}\n')
    changed = [f"sft={{images: {tmp_path / 'list.jsonl'}, weight: 0.1, cache: {tmp_path / 'file'}}}"]
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=r"cache = .* is no folder"):
        reduced(load_recipe("sd15-ddpo", changed), tmp_path / "again")


SETS = {"vendi": "", "frechet": "exemplars: exemplars", "kid": "captions: captions.txt", "cmmd": "exemplars: exemplars"}


@pytest.mark.parametrize("kind", SETS)
def test_a_stand_in_for_a_reward_of_sets_is_one(kind, tmp_path):
    (tmp_path / "exemplars").mkdir()
    for n in range(4):
        media.save_png(torch.full((3, 8, 8), n / 4), tmp_path / "exemplars" / f"{n}.png")
    (tmp_path / "captions.txt").write_text("a bad dog\na lake\na fine dog\n")
    about = "scale: s\nlicence: l\nsource: s\n"
    card = tmp_path / "card.yaml"
    card.write_text(f"name: mine\ntype: {kind}\npath: someone/dino\nrevision: main\n{SETS[kind]}\n{about}")
    found = rewards.load(write_reward(missing_reward(str(card)), tmp_path / "reward"))
    assert isinstance(found, SetCredit)
    assert (found.name, type(found.of_set).__name__.casefold()) == ("mine", f"{kind}reward")


@pytest.mark.parametrize("name", ["mj-video", "video-reward", "mine.yaml"])
def test_a_reward_of_videos_that_is_elsewhere_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = "scale: s\nlicence: l\nsource: s\n"
    (tmp_path / "mine.yaml").write_text(f"name: mine\ntype: frames\nreward: pickscore\n{about}")
    with pytest.raises(RecipeError, match=rf"reward {name.removesuffix('.yaml')}\n.*scores videos"):
        missing_reward(name)


def test_a_dry_run_of_no_recipe_is_refused():
    with pytest.raises(RecipeError, match="name one"):
        doctor.run(None, [], [], dry_run=True)


@pytest.mark.verify
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not is_search(read_recipe(name))])
def test_every_shipped_recipe_passes(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    doctor.run(name, [], [], dry_run=True)
    assert "The recipe ran in" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
