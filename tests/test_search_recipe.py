"""Recipes to search with: what is read, what is refused and in which words, and what ships."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign.config
from diffalign import rewards
from diffalign.cli.plugins import load_plugin
from diffalign.config import Recipe, RecipeError, is_search, json_schema, load_recipe, read_recipe
from diffalign.policies import POLICIES
from diffalign.recipe_file import shipped_recipes
from diffalign.recipe_references import PIPELINES, content_hashes, sha256
from diffalign.search.config import METHODS
from diffalign.search_recipe import SearchRecipe, load_search_recipe

RECIPE = """
pipeline: {path: model}
method: {name: tree_search, exploration: 0.3}
num_inference_steps: 20
guidance_scale: 3
budget: {nfe: 2000}
rewards: {train: [{name: shapes-clip, weight: 0.5}], heldout: [shapes-oracle]}
prompts: prompts.txt
output_dir: runs/x
"""
SEARCHES = [name for name in shipped_recipes() if is_search(read_recipe(name))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(load, *args):
    with pytest.raises(RecipeError) as caught:
        load(*args)
    return " ".join(str(caught.value).split())


def test_a_recipe_is_read_with_its_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    recipe = load_search_recipe(folder / "recipe.yaml", ["budget.seconds=1.5", "num_prompts=1"])
    assert recipe.pipeline.path == str(folder / "model")
    assert recipe.prompts == str(folder / "prompts.txt")
    assert (recipe.method.exploration, recipe.method.backup) == (0.3, "max")
    assert (recipe.budget.nfe, recipe.budget.reward_calls, recipe.budget.seconds) == (2000, None, 1.5)
    assert recipe.eta is None
    in_place = load_search_recipe(folder / "recipe.yaml", ['prompts=["a red circle"]'])
    assert in_place.prompts == ["a red circle"]


def test_everything_wrong_is_told_together(folder):
    told = refusal(
        load_search_recipe,
        "recipe.yaml",
        ["method.leaf_bach=3", "budget.nfe=0", "rewards.heldout=[shapes-clop]", "prompts=no.txt", "adapter.path=lora"],
    )
    assert "5 things are wrong" in told
    assert "method.leaf_bach = 3 is no known key: did you mean leaf_batch?" in told
    assert "budget.nfe = 0 should be greater than 0" in told
    assert "shapes-clop is no known reward: did you mean shapes-clip?" in told
    assert "no.txt does not exist" in told
    assert "is no LoRA" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("prompts=[]", "prompts = [] should be texts that are not blank, at least one"),
        ('prompts=["a", " "]', "should be texts that are not blank"),
        ("budget.nfe=null", "has no limit: give nfe, reward_calls or seconds"),
        ("budget.nfe=19", "nfe = 19 does not pay for one image of num_inference_steps = 20; raise it"),
        ("method={name: tree_serch}", "'tree_serch' is unknown: did you mean tree_search?"),
        ("max_train_steps=3", "max_train_steps = 3 is no known key"),
        ("rewards.heldout=[shapes-clip]", "a held-out reward never trains, keep one"),
    ],
)
def test_what_is_refused(folder, override, told):
    assert told in refusal(load_search_recipe, "recipe.yaml", [override])


BY_GRADIENT = ["das", "dno", "guidance", "reno", "tds"]
BRANCHING = ["das", "gibbs", "smc", "svdd", "tds", "tree_sampling", "tree_search"]


@pytest.mark.parametrize("method", BY_GRADIENT)
@pytest.mark.parametrize("reward", ["jpeg-size", "flow-grpo-compressibility", "mine.yaml"])
def test_a_method_by_gradient_refuses_a_reward_that_has_none(folder, method, reward):
    parts = "{type: mean, members: [shapes-clip, {type: hinge, reward: ocr, target: 1.0}]}"  # says nothing itself
    (folder / "mine.yaml").write_text(parts)
    told = refusal(load_search_recipe, "recipe.yaml", [f"method={{name: {method}}}", f"rewards.train=[{reward}]"])
    assert f"{reward} has no gradient, and {method} follows that of the reward: use smc or a tree" in told


@pytest.mark.parametrize("method", BRANCHING)
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("eta=0", "eta = 0 makes every step deterministic, and {} branches by the noise of steps"),
        ("num_inference_steps=1", "num_inference_steps = 1 leaves {} nothing to branch by: raise it, or use best_of_n"),
    ],
)
def test_a_method_that_branches_refuses_a_chain_that_does_not(folder, method, setting, told):
    assert told.format(method) in refusal(load_search_recipe, "recipe.yaml", [f"method={{name: {method}}}", setting])


@pytest.mark.parametrize(
    "overrides",
    [
        ["method={name: tree_sampling, branch_levels: []}", "eta=0"],
        ["method={name: smc, resample_levels: []}", "eta=0"],
        ["method={name: smc}", "law=consistency"],
        ["method={name: reno}", "num_inference_steps=1", "eta=0"],
        ["method={name: guidance}", "eta=0"],
        ["method={name: nrg, noisy_reward: zoo:shapes-noisy-reward}", "rewards.train=[jpeg-size]"],
        ["method={name: svdd}", "rewards.train=[jpeg-size]"],
        ["pipeline.path=zoo:shapes-sd3", "eta=1.4"],
        ["guidance_interval=[0.1, 0.2]"],
    ],
)
def test_what_can_be_searched_is_not_refused(folder, overrides):
    load_search_recipe("recipe.yaml", overrides)


def test_what_no_method_can_search_is_told_together(folder):
    overrides = ["pipeline.path=zoo:shapes-sd", "eta=1.4", "guidance_interval=[0.31, 0.34]", "num_prompts=0"]
    overrides += ["rewards.train=[video-reward, dancegrpo]", "rewards.heldout=[]"]
    told = refusal(load_search_recipe, "recipe.yaml", overrides)
    assert "5 things are wrong" in told
    assert "num_prompts = 0 should be greater than 0" in told
    assert "eta = 1.4 is outside [0, 1] of DDIM" in told
    assert "guidance_interval = [0.31, 0.34] holds none of 20 steps: widen it" in told
    assert "video-reward scores videos, and a search scores image after image" in told
    assert "dancegrpo compares the images of a batch, and a search scores image after image" in told
    told = refusal(load_search_recipe, "recipe.yaml", ["law=consistency", "eta=0.5"])
    assert "eta = 0.5 is of no use to law = consistency" in told


@pytest.mark.parametrize("name", ["FluxPipeline", "LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_guidance_in_an_interval_needs_an_unconditional_branch(folder, name):
    (folder / "model" / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "model" / "unet").mkdir()
    width = 256 if name == "LatentConsistencyModelPipeline" else None
    (folder / "model" / "unet" / "config.json").write_text(json.dumps({"time_cond_proj_dim": width}))
    if name == "StableDiffusionPipeline":
        load_search_recipe("recipe.yaml", ["guidance_interval=[0, 0.8]"])
        return
    told = refusal(load_search_recipe, "recipe.yaml", ["guidance_interval=[0, 0.8]"])
    assert f"guidance_interval = [0, 0.8] cannot be kept by a {name}, which evaluates no unconditional branch" in told
    load_search_recipe("recipe.yaml", ["guidance_interval=[0, 1]"])


@pytest.mark.parametrize("method", ["smc", "tds", "das"])
def test_seconds_alone_do_not_say_how_many_particles_there_are(folder, method):
    overrides = [f"method={{name: {method}}}", "budget.nfe=null", "budget.seconds=5"]
    told = refusal(load_search_recipe, "recipe.yaml", overrides)
    assert "budget.seconds = 5 does not say how many particles there are: give method.num_particles" in told
    load_search_recipe("recipe.yaml", [*overrides, "method.num_particles=8"])
    load_search_recipe("recipe.yaml", [*overrides, "budget.reward_calls=100"])


IN_PLACE = {
    "dynamic_degree": {},
    "motion_smoothness": {},
    "frames": {"reward": "jpeg-size"},
    "group_standardised": {"terms": ["jpeg-size"]},
    "pareto_rank": {"members": ["jpeg-size"]},
    "mean": {"members": ["jpeg-size"]},
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_is_refused_by_its_type_is_what_the_reward_says(folder, kind):
    text = {"scale": "s", "licence": "l", "source": "s"}
    card = {"name": "mine", "type": kind} | text | IN_PLACE[kind]
    reward = rewards.load(card)
    (folder / "mine.yaml").write_text(json.dumps(card))
    if reward.media == "image" and not reward.groupwise:
        load_search_recipe("recipe.yaml", ["rewards.train=[mine.yaml]"])
    else:
        told = refusal(load_search_recipe, "recipe.yaml", ["rewards.train=[mine.yaml]"])
        assert ("scores videos" if reward.media == "video" else "compares the images") in told


def test_a_noisy_reward_is_anchored_checked_and_hashed(folder, monkeypatch):
    made = folder / "made"
    made.mkdir()
    (folder / "nrg.yaml").write_text(RECIPE.replace("tree_search, exploration: 0.3", "nrg, noisy_reward: made"))
    told = refusal(load_search_recipe, "nrg.yaml")
    assert f"method.noisy_reward = {made} holds no noise-aware reward: config.json is missing; give a folder" in told
    (made / "config.json").write_text('{"denoiser": "SD3Transformer2DModel", "objectives": {"warm": 1.0}}')
    assert "heads.safetensors is missing" in refusal(load_search_recipe, "nrg.yaml")
    (made / "heads.safetensors").write_bytes(b"")
    monkeypatch.chdir(folder.parent)
    recipe = load_search_recipe(folder / "nrg.yaml", ["method.weights={warm: 2}"])
    assert recipe.method.noisy_reward == str(made)
    hashes = content_hashes(recipe.model_dump(mode="json"))
    assert hashes["method.noisy_reward"] == sha256(made)
    assert "cold is no objective of this reward: use warm" in refusal(
        load_search_recipe, folder / "nrg.yaml", ["method.weights={cold: 1}"]
    )
    told = refusal(load_search_recipe, folder / "nrg.yaml", ["pipeline.path=zoo:shapes-sd"])
    assert "was made for the denoiser SD3Transformer2DModel, and that of this pipeline is UNet2DConditionModel" in told
    told = refusal(load_search_recipe, "search-nrg", ["method.noisy_reward=zoo:shapes-noisy"])
    assert "did you mean 'shapes-noisy-reward'" in told


def test_a_pipeline_of_no_known_family_is_refused(folder):
    (folder / "model" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    told = refusal(load_search_recipe, "recipe.yaml")
    assert "is a KandinskyPipeline, which belongs to no known family: use one of" in told
    assert "StableDiffusionXLPipeline" in told
    families = [POLICIES.get(name) for name in POLICIES.names()]
    own = [family for family in families if family.__module__.startswith("diffalign.policies")]
    assert set(PIPELINES) == {family.pipeline_class for family in own}


def test_no_heavy_library_is_loaded_for_a_recipe(folder):
    code = (
        "import sys; from diffalign.search_recipe import load_search_recipe, RecipeError\n"
        "load_search_recipe('search-nrg')\n"
        "try: load_search_recipe('recipe.yaml', ['eta=0', 'rewards.train=[reno]', 'method={name: das}'])\n"
        "except RecipeError: pass\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_recipe_with_a_budget_is_one_to_search_with(folder):
    told = refusal(load_recipe, "recipe.yaml")
    assert "budget makes this a search: run `diffalign search recipe.yaml`" in told
    told = refusal(load_search_recipe, "shapes-sd-alignprop")
    assert "budget is missing, and reward_backprop trains: run `diffalign train shapes-sd-alignprop`" in told
    without = folder / "without.yaml"
    without.write_text(RECIPE.replace("budget: {nfe: 2000}", ""))
    assert "budget is required: add it" in refusal(load_search_recipe, "without.yaml")


def test_what_is_written_reads_again(folder):
    recipe = load_search_recipe("recipe.yaml")
    diffalign.config.write_resolved(recipe, folder / "config.yaml")
    assert load_search_recipe("config.yaml") == recipe


@pytest.mark.parametrize("name", SEARCHES)
def test_shipped_recipes_are_whole(name):
    recipe = load_search_recipe(name)
    assert recipe.output_dir == f"runs/{name}"


def test_the_schema_that_ships_is_up_to_date():
    path = Path(__file__).parent.parent / "pipelines" / "search.schema.json"
    remedy = "bring it up to date with: python -m diffalign show search-schema > pipelines/search.schema.json"
    schema = json_schema(SearchRecipe)
    assert json.loads(path.read_text(encoding="utf-8")) == schema, remedy
    assert "required" not in schema
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(METHODS)


def test_a_plugin_brings_a_search_method(folder):
    (folder / "mine.py").write_text(
        "from typing import Literal\n"
        "from diffalign.search.config import METHODS\n"
        "from diffalign.settings import Settings\n"
        "class Mine(Settings):\n    name: Literal['mine'] = 'mine'\n    strength: float = 1\n"
        "METHODS['mine'] = Mine\n"
    )
    before = dict(METHODS)
    try:
        load_plugin(folder / "mine.py")
        assert load_search_recipe("recipe.yaml", ["method={name: mine, strength: 2}"]).method.strength == 2
        assert "did you mean strength?" in refusal(load_search_recipe, "recipe.yaml", ["method={name: mine, stren: 2}"])
    finally:
        METHODS.clear()
        METHODS.update(before)
        for model in (Recipe, SearchRecipe):
            model.model_rebuild(force=True)
