"""Recipes: what is read, what is refused, and in which words."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffalign.config import RecipeError, is_search, json_schema, load_recipe, read_recipe, write_resolved
from diffalign.recipe_file import shipped_recipes

RECIPE = """
pipeline: {path: model, dtype: float32, attention: auto}
adapter: {type: lora, rank: 8, alpha: 8, target_modules: attention}
method:
  {name: reward_backprop, num_inference_steps: 20, guidance_scale: 3.0, gradient: {kind: drtune, k: 3}, kl_weight: 0.01}
rewards:
  train: [{name: shapes-clip, weight: 1.0}]
  heldout: [shapes-preference]
prompts: {train: prompts.txt, validation: prompts.txt, test: prompts.txt}
num_prompts_per_step: 16
group_size: 1
micro_batch_size: auto
learning_rate: 1.0e-3
max_train_steps: 40
mixed_precision: "no"
seed: 0
output_dir: runs/x
checkpointing_steps: 10
checkpoints_total_limit: 2
report_to: [tensorboard]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a recipe, and what the recipe points to, without any weight."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(*args):
    with pytest.raises(RecipeError) as caught:
        load_recipe(*args)
    return str(caught.value)


def test_the_recipe_of_the_readme_is_read_as_it_stands(folder):
    recipe = load_recipe("recipe.yaml")
    assert recipe.pipeline.path == str(folder / "model")
    assert recipe.method.name == "reward_backprop"
    assert recipe.method.gradient.k == 3
    assert [(term.name, term.weight) for term in recipe.rewards.train] == [("shapes-clip", 1.0)]
    assert recipe.prompts.train == str(folder / "prompts.txt")
    assert recipe.mixed_precision == "no"
    assert recipe.learning_rate == 1e-3
    assert recipe.output_dir == "runs/x"


def test_evaluation_samples_as_the_method_unless_told_otherwise(folder):
    assert load_recipe("recipe.yaml").evaluation.num_inference_steps == 20
    assert load_recipe("recipe.yaml").evaluation.guidance_scale == 3.0
    interval = load_recipe("recipe.yaml", ["method.guidance_interval=[0.2, 1]"]).evaluation.guidance_interval
    assert interval == [0.2, 1.0]
    other = load_recipe("recipe.yaml", ["evaluation.num_inference_steps=7"]).evaluation
    assert (other.num_inference_steps, other.guidance_scale) == (7, 3.0)


def test_a_reward_may_be_just_its_name(folder):
    recipe = load_recipe("recipe.yaml", ["rewards.train=[shapes-clip, {name: pickscore, weight: -0.5}]"])
    assert [(term.name, term.weight) for term in recipe.rewards.train] == [("shapes-clip", 1.0), ("pickscore", -0.5)]


def test_a_recipe_cannot_be_changed(folder):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("recipe.yaml").seed = 1


PAIRS = "method: {name: diffusion_dpo, pairs: pairs.jsonl}"


@pytest.fixture
def preferences(folder):
    """A recipe that learns from pairs, and a file in which they could be."""
    text = RECIPE.replace("train: prompts.txt, ", "").replace("train: [{name: shapes-clip, weight: 1.0}]\n", "")
    method = text[text.index("method:") : text.index("rewards:")]
    write(folder, "preferences.yaml", text.replace(method, PAIRS + "\n"))
    write(folder, "pairs.jsonl", "")
    return folder


def test_a_method_of_pairs_needs_neither_prompts_nor_a_reward_to_train_on(preferences):
    recipe = load_recipe("preferences.yaml")
    assert (recipe.rewards.train, recipe.rewards.heldout) == ([], ["shapes-preference"])
    assert recipe.prompts.train is None
    assert recipe.method.pairs == str(preferences / "pairs.jsonl")
    assert recipe.method.beta == 5000
    watched = load_recipe(
        "preferences.yaml", ["rewards.train=[shapes-clip]", "method={name: flow_dpo, pairs: pairs.jsonl}"]
    )
    assert [term.name for term in watched.rewards.train] == ["shapes-clip"]


def test_pairs_start_from_the_recipe_where_they_are_there_and_else_from_the_working_directory(preferences):
    below = write(preferences, "below/recipe.yaml", (preferences / "preferences.yaml").read_text())
    text = below.read_text().replace("prompts.txt", "../prompts.txt").replace("path: model", "path: ../model")
    below.write_text(text)
    assert load_recipe(below).method.pairs == "pairs.jsonl"
    beside = write(preferences, "below/pairs.jsonl", "")
    assert load_recipe(below).method.pairs == str(beside)


@pytest.mark.parametrize(
    ("override", "value", "remedy"),
    [
        ("method.pairs=none.parquet", "method.pairs = ", "does not exist: give pairs (.parquet, .jsonl, .json)"),
        ("method.pairs=prompts.txt", "prompts.txt", "has another suffix: give pairs"),
        ("method.beta=0", "method.beta = 0", "greater than 0"),
        ("rewards.heldout=[]", "rewards.heldout = []", "one must judge; name at least 1 item"),
        ("prompts.train=prompts.txt", "beside method.pairs, which has its own", "take it out"),
        ("method.beta_schedule=timestep", "method.beta_schedule = timestep", "is no key of this section"),
    ],
)
def test_a_wrong_recipe_of_pairs_is_told(preferences, override, value, remedy):
    flat = " ".join(refusal("preferences.yaml", [override]).split())
    assert "one thing is wrong" in flat
    assert value in flat
    assert remedy in flat


# Each wrong setting: override, the value as told, the remedy.
WRONG = [
    ("learning_rte=1e-3", "learning_rte = 0.001", "did you mean learning_rate?"),
    ("guidance_scale=3", "guidance_scale = 3", "method.guidance_scale or evaluation.guidance_scale"),
    ("method.gradient.steps=3", "method.gradient.steps = 3", "use one of early_stop, k, kind"),
    ("zzz=3", "zzz = 3", "remove it, or use one of"),
    ("method.name=rewardbackprop", "'rewardbackprop'", "did you mean reward_backprop?"),
    ("method.gradient.kind=draft", "'draft'", "known: full, last_k, random_k, drtune"),
    ("method.gradient.k=30", "asks for 30 steps", "lower it, or use gradient.kind = full"),
    ("method.guidance_interval=[0.8, 0.2]", "[0.8, 0.2] is no interval", "0 <= start < stop <= 1"),
    ("mixed_precision=fp16", "mixed_precision = fp16", "one of no, bf16: did you mean bf16?"),
    ("pipeline.dtype=float23", "pipeline.dtype = float23", "did you mean float32?"),
    ('group_size="4"', "group_size = 4", "not the text '4': take the quotes off"),
    ("group_size=true", "group_size = true", "valid integer"),
    ("micro_batch_size=2.5", "micro_batch_size = 2.5", "or one of auto"),
    ("seed=-1", "seed = -1", "greater than or equal to 0"),
    ("learning_rate=0", "learning_rate = 0", "greater than 0"),
    ("adapter=lora", "adapter = lora", "a section with keys of its own"),
    ("rewards.train=[]", "rewards.train = []", "at least 1 item"),
    ("rewards.train.0.name=shapes-clp", "rewards.train.0 = shapes-clp", "did you mean shapes-clip?"),
    ("rewards.heldout=[shapes-clip]", "shapes-clip is in rewards.train and in rewards.heldout", "keep one"),
    ("rewards.heldout=[mine.yaml]", "mine.yaml", "does not exist"),
    ("prompts.train=prompts:nope", "prompts:nope", "known:"),
    ("prompts.test=tests.txt", "tests.txt", "does not exist: give prompts:NAME, or a file"),
    ("prompts.test=recipe.yaml", "recipe.yaml", "prompts are .txt, .jsonl, .parquet"),
    ("pipeline.path=zoo:nope", "zoo:nope", "known:"),
    ("pipeline.path=./nowhere", "nowhere", "a folder with a model_index.json, or a hub id"),
    ("pipeline.path=.", "pipeline.path", "model_index.json is missing"),
    ("pipeline.offload_blocks=true", "gradient_checkpointing = step", "set gradient_checkpointing=block"),
    ("pipeline.tiny_decoder=./nowhere", "nowhere", "a hub id such as madebyollin/taesd"),
    ("adapter.path=model", "adapter.path", "pytorch_lora_weights.safetensors is missing; give a folder"),
    ("resume_from_checkpoint=runs/x/step-000010", "step-000010", "or latest"),
    ("sft={images: none.jsonl, weight: 1}", "none.jsonl", "is no list of images: give a .jsonl with file and prompt"),
    ("sft={images: prompts.txt, weight: 1}", "prompts.txt", "is no list of images: give a .jsonl with file and prompt"),
    ("report_to=[trackio]", "report_to.0 = trackio", "pip install 'diffalign[tracking]'"),
    ("report_to=[tensorbord]", "report_to.0 = tensorbord", "did you mean tensorboard?"),
    ("rewards.train.3.weight=2", "rewards.train.3", "has 1 entries, counted from 0"),
    ("seed", "seed", "write key.sub=value"),
    ("--learning-rate", "--learning-rate", "write learning_rate=VALUE"),
    ("seed=[1", "seed=[1", "line 1"),
    ("learning_rate=.inf", "learning_rate=.inf", "not finite: write a plain number"),
]


@pytest.mark.parametrize(("override", "value", "remedy"), WRONG, ids=[each[0] for each in WRONG])
def test_a_wrong_setting_is_told_with_value_and_remedy(folder, monkeypatch, override, value, remedy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no tracker is installed
    told = refusal("recipe.yaml", [override])
    assert "one thing is wrong" in told
    flat = " ".join(told.split())
    assert value in flat
    assert remedy in flat


def test_everything_wrong_is_told_together(folder):
    overrides = ["learning_rte=1", "seed=-1", "prompts.test=no.txt", "rewards.heldout=[nope]", "method.gradient.kind=x"]
    told = refusal("recipe.yaml", overrides)
    assert "5 things are wrong" in told
    for value in ("learning_rte", "seed = -1", "no.txt", "nope", "'x'"):
        assert value in told


def test_a_recipe_with_everything_wrong_still_fits_on_a_screen(folder):
    told = refusal("recipe.yaml", [f"wrong_{i}={i}" for i in range(50)])
    assert len(told.splitlines()) <= 25
    assert "50 things are wrong" in told
    assert "more, told once these are right" in told


def test_a_missing_section_is_named(folder):
    write(folder, "short.yaml", "seed: 1\n")
    told = refusal("short.yaml")
    for key in ("pipeline", "method", "rewards", "prompts", "output_dir"):
        assert f"  {key}\n    is required: add it" in told


def test_a_section_that_does_not_say_its_kind(folder):
    write(folder, "short.yaml", "method: {eta: 0}\n")
    assert "  method\n    needs the key 'name', which says what the others mean" in refusal("short.yaml")


def test_a_missing_recipe_names_the_near_one(folder):
    assert "did you mean recipe.yaml?" in refusal("recipes.yaml")
    assert "diffalign ls recipes" in refusal("something-else")
    assert "is a folder" in refusal("model")


YAML = {
    "seed: 1\nseed: 2": "line 2, column 1: key 'seed' is there twice, first in line 1: keep one",
    "prompts: {train: a, train: b}": "key 'train' is there twice",
    "a: &x [1]\nb: *x": "alias *x: write the value out, or share it with `extends`",
    "seed: !!python/object/apply:os.system [ls]": "could not determine a constructor for the tag",
    "seed: !!set {a, b}": "made by a tag",
    "seed: 2020-13-45\n  x: [": "line 2",
    "1: one": "key 1 is not a text: put it in quotes",
    "learning_rate: .nan": "not finite",
    "- a": "holds a list, and a recipe is a mapping",
    "": "is empty, and a recipe is a mapping",
    "[" * 100_000: "nested too deeply",
    f"seed: {'1' * 5000}": "cannot be read",
    "# " + "x" * 1_000_001: "1,000,003 bytes and a recipe at most 1,000,000",
    "seed: 1\0": "is not YAML",
    "extends: [a, b]": "names one recipe file",
}


@pytest.mark.parametrize(("text", "message"), YAML.items(), ids=[message[:30] for message in YAML.values()])
def test_yaml_that_is_refused(folder, text, message):
    write(folder, "bad.yaml", text)
    assert message in " ".join(refusal("bad.yaml").split())


def test_a_file_that_is_no_text(folder):
    (folder / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not text in UTF-8" in refusal("bad.yaml")


def test_words_of_yaml_1_1_stay_words(folder):
    write(folder, "one.yaml", "extends: recipe.yaml\nmixed_precision: no\nlearning_rate: 1e-4\noutput_dir: on\n")
    recipe = load_recipe("one.yaml")
    assert (recipe.mixed_precision, recipe.learning_rate, recipe.output_dir) == ("no", 1e-4, "on")


def test_extends_merges_and_each_file_has_its_own_relative_paths(folder):
    write(folder, "deep/er/mine.yaml", "extends: ../../recipe.yaml\nprompts: {test: own.jsonl}\nmax_train_steps: 3\n")
    write(folder, "deep/er/own.jsonl", '{"prompt": "a star"}\n')
    recipe = load_recipe("deep/er/mine.yaml")
    assert recipe.prompts.test == str(folder / "deep/er/own.jsonl")
    assert recipe.prompts.train == str(folder / "prompts.txt")
    assert recipe.max_train_steps == 3
    assert recipe.method.gradient.k == 3


def test_another_kind_replaces_the_one_below_whole(folder):
    write(folder, "mine.yaml", "extends: recipe.yaml\nmethod: {gradient: {kind: random_k, high: 5}}\n")
    assert load_recipe("mine.yaml").method.gradient.model_dump() == {"kind": "random_k", "low": 1, "high": 5}
    assert load_recipe("recipe.yaml", ["method.gradient.kind=full"]).method.gradient.model_dump() == {"kind": "full"}
    switched = load_recipe("recipe.yaml", ["method.gradient.k=2", "method.gradient.kind=last_k"])
    assert switched.method.gradient.model_dump() == {"kind": "last_k", "k": 2}


def test_extends_in_a_circle(folder):
    write(folder, "a.yaml", "extends: b.yaml\n")
    write(folder, "b.yaml", "extends: a.yaml\n")
    assert "extends itself (a.yaml -> b.yaml -> a.yaml)" in refusal("a.yaml")


def test_extends_of_nothing(folder):
    write(folder, "a.yaml", "extends: recip.yaml\n")
    assert "did you mean recipe.yaml?" in refusal("a.yaml")


def test_overrides(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "few.txt").write_text("a cat")
    monkeypatch.chdir(folder / "elsewhere")
    overrides = ["rewards.train.0.weight=2", "adapter.rank=4", "prompts.test=few.txt", "report_to=[]", "adapter.rank=5"]
    recipe = load_recipe("../recipe.yaml", overrides)
    assert recipe.rewards.train[0].weight == 2.0
    assert recipe.adapter.rank == 5
    assert recipe.prompts.test == str(folder / "elsewhere" / "few.txt")
    assert recipe.prompts.train == str(folder / "prompts.txt")
    assert recipe.report_to == []


def test_a_hub_id_is_not_taken_for_a_path(folder):
    recipe = load_recipe("recipe.yaml", ["pipeline.path=stable-diffusion-v1-5/stable-diffusion-v1-5"])
    assert recipe.pipeline.path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    (folder / "owner" / "name").mkdir(parents=True)
    (folder / "owner" / "name" / "model_index.json").write_text("{}")
    assert load_recipe("recipe.yaml", ["pipeline.path=owner/name"]).pipeline.path == str(folder / "owner/name")


def test_the_resolved_recipe_is_read_again_and_records_what_it_came_from(folder):
    recipe = load_recipe("recipe.yaml", ["seed=7"])
    write_resolved(recipe, folder / "run" / "config.yaml")
    assert load_recipe("run/config.yaml") == recipe
    recorded = yaml.safe_load((folder / "run" / "config.yaml").read_text())["recorded"]
    assert recorded["versions"]["python"] == sys.version.split()[0]
    assert recorded["versions"]["torch"]
    assert recorded["sha256"]["prompts.train"] == hashlib.sha256((folder / "prompts.txt").read_bytes()).hexdigest()
    before = recorded["sha256"]["pipeline.path"]
    (folder / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    write_resolved(recipe, folder / "run" / "config.yaml")
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["recorded"]["sha256"]["pipeline.path"] != before


def test_the_schema_knows_every_key(folder):
    schema = json_schema()
    recipe = yaml.safe_load(RECIPE)
    assert set(recipe) | {"extends"} <= set(schema["properties"])
    method = schema["$defs"]["RewardBackpropConfig"]
    assert set(recipe["method"]) <= set(method["properties"])
    assert method["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


def test_the_shipped_schema_is_that_of_the_code():
    path = Path(__file__).parent.parent / "pipelines" / "recipe.schema.json"
    remedy = "bring it up to date with: python -m diffalign show schema > pipelines/recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema(), remedy


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not is_search(read_recipe(name))])
def test_every_shipped_recipe_is_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = read_recipe(name)["method"].get("pairs")
    if pairs:  # written by a command of the user's
        write(tmp_path, pairs, "")
    recipe = load_recipe(name)
    assert recipe.output_dir.startswith("runs/")


def test_no_heavy_library_is_loaded_for_a_recipe(folder):
    code = (
        "import sys; from diffalign.config import load_recipe, RecipeError\n"
        "load_recipe('recipe.yaml')\n"
        "try: load_recipe('recipe.yaml', ['sed=1', 'rewards.heldout=[nope]'])\n"
        "except RecipeError: pass\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
