"""Recipes to search with: what is read, what is refused and in which words, and what ships."""

import json
from pathlib import Path

import pytest

import diffalign.config
from diffalign.cli.plugins import load_plugin
from diffalign.config import Recipe, RecipeError, is_search, json_schema, load_recipe, read_recipe
from diffalign.recipe_file import shipped_recipes
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
