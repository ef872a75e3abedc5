"""The command line: exit statuses, one screen, what is imported, listings and copies."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import diffalign.registry
from diffalign.cli.errors import WRONG_INPUT, explained
from diffalign.config import RecipeError
from diffalign.recipe_file import shipped_recipes

ROOT = Path(diffalign.__file__).parent.parent
RECIPE = """
pipeline: {path: model}
method: {name: reward_backprop, num_inference_steps: 20, gradient: {kind: drtune, k: 3}}
rewards: {train: [shapes-clip], heldout: [shapes-preference]}
prompts: {train: prompts.txt, validation: prompts.txt, test: prompts.txt}
output_dir: runs/x
"""
SEARCH = """
pipeline: {path: model}
method: {name: best_of_n}
budget: {nfe: 200}
rewards: {train: [shapes-clip]}
prompts: prompts.txt
output_dir: runs/x
"""
# What it ends with, after the last line of the command's own output.
HEAVY = "import sys; print('LOADED', sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
CODE = f"import atexit; atexit.register(lambda: exec({HEAVY!r})); import diffalign.cli; diffalign.cli.main()"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def diffalign_command(folder, *args):
    """The command in a process of its own, in a terminal of 80 columns."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, args)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# Six recipes that are wrong in six ways: what to write, and what must be told: the value and the remedy.
WRONG = {
    "a misspelt key": ("learning_rte: 1e-3", ["learning_rte = 0.001", "did you mean learning_rate?"]),
    "a wrong type": ("max_train_steps: many", ["max_train_steps = many", "should be a valid integer"]),
    "an unknown reward": ("rewards: {train: [shapes-clop]}", ["shapes-clop", "did you mean shapes-clip?"]),
    "a file that is not there": ("prompts: {train: no.txt}", ["no.txt", "does not exist: give prompts:NAME"]),
    "settings that exclude each other": (
        "method: {gradient: {kind: drtune, k: 40}}",
        ["40 steps", "num_inference_steps is 20", "lower it"],
    ),
    "a key that is there twice": ("seed: 1\nseed: 2", ["line 3", "'seed' is there twice", "keep one"]),
}


@pytest.mark.parametrize(("text", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_ends_with_status_2_on_one_screen(folder, text, told):
    (folder / "wrong.yaml").write_text(f"extends: recipe.yaml\n{text}\n")
    done = diffalign_command(folder, "train", "wrong.yaml")
    assert done.returncode == WRONG_INPUT
    assert len(done.stderr.splitlines()) <= 25
    assert "wrong.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    for words in told:
        assert words in done.stderr
    assert "LOADED []" in done.stdout, "a refusal loads no heavy library"
    assert not (folder / "runs").exists()


def test_a_recipe_given_to_the_wrong_command_ends_with_status_2_and_the_right_one(folder):
    (folder / "search.yaml").write_text(SEARCH)
    for command, name in (("train", "search"), ("doctor", "search"), ("search", "recipe")):
        done = diffalign_command(folder, command, f"{name}.yaml")
        assert done.returncode == WRONG_INPUT
        assert f"diffalign {'search' if name == 'search' else 'train'} {name}.yaml" in " ".join(done.stderr.split())
        assert "LOADED []" in done.stdout
    done = diffalign_command(folder, "search", "search.yaml", "budget.nfe=many")
    assert "budget.nfe = many" in done.stderr
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize("command", [("doctor",), ("train", "--dry-run")], ids=" ".join)
def test_a_check_of_a_wrong_recipe_ends_with_status_2(folder, command):
    done = diffalign_command(folder, *command, "recipe.yaml", "learning_rate=0")
    assert done.returncode == WRONG_INPUT
    assert "learning_rate = 0" in done.stderr
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize(("verdict", "status"), [("PASS", 0), ("WARN", 0), ("FAIL", 1)])
def test_the_doctor_ends_with_1_where_a_check_fails(folder, monkeypatch, capsys, verdict, status):
    from diffalign.cli import doctor
    from diffalign.engine import doctor as engine

    finding = engine.Finding("memory", verdict, "about 9 of 8 GiB [each]", "" if verdict == "PASS" else "set [this]")
    monkeypatch.setattr(engine, "examine", lambda recipe: iter([finding, finding]))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as ended:
        doctor.run("recipe.yaml", [], [])
    assert not status or ended.value.code == status
    lines = [f"{verdict}  memory: about 9 of 8 GiB [each]", *([] if verdict == "PASS" else ["      set [this]"])]
    assert capsys.readouterr().out.splitlines() == lines * 2


def test_the_doctor_without_a_recipe_tells_the_machine(capsys):
    from diffalign.cli import doctor

    doctor.run(None, [], [])
    out = capsys.readouterr().out
    assert out.startswith("versions")
    assert "attention native" in out


def test_an_option_instead_of_an_override(folder):
    done = diffalign_command(folder, "train", "recipe.yaml", "--learning-rate", "1e-3")
    assert done.returncode == WRONG_INPUT
    assert "write learning_rate=VALUE" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("train", "--help"),
        ("search", "--help"),
        ("doctor", "--help"),
        ("sample", "--help"),
        ("score", "--help"),
        ("score", "bench", "--help"),
        ("show", "--help"),
        ("cp", "--help"),
        ("ls",),
    ],
)
def test_help_and_listings_load_nothing_heavy(folder, args):
    done = diffalign_command(folder, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    if len(args) == 2:
        assert f"diffalign {args[0]} " in done.stdout, "each help has an example"


def test_ls_names_what_ships(folder):
    for kind, name in [
        ("recipes", "shapes-sd-alignprop"),
        ("rewards", "shapes-oracle"),
        ("methods", "reward_backprop"),
        ("methods", "tree_search"),
    ]:
        assert name in diffalign_command(folder, "ls", kind).stdout
    assert "prompts:shapes-test" in diffalign_command(folder, "ls", "prompts").stdout


def test_show(folder):
    assert "kl_weight: 0.0  # weight" in diffalign_command(folder, "show", "reward_backprop").stdout
    assert "licence: Apache-2.0" in diffalign_command(folder, "show", "shapes-clip").stdout
    assert '"$schema"' in diffalign_command(folder, "show", "schema").stdout
    done = diffalign_command(folder, "show", "shapes-clop")
    assert done.returncode == WRONG_INPUT
    assert "did you mean shapes-clip?" in done.stderr


def test_cp_of_a_recipe_that_extends_writes_it_out(folder):
    (folder / "mine.yaml").write_text("# Mine.\nextends: recipe.yaml\nseed: 3\n")
    assert diffalign_command(folder, "cp", "mine.yaml", "copy.yaml").returncode == 0
    text = (folder / "copy.yaml").read_text()
    assert text.startswith("# Mine.\n")
    tree = yaml.safe_load(text)
    assert "extends" not in tree
    assert tree["seed"] == 3
    assert tree["prompts"]["train"] == str(folder / "prompts.txt")
    again = diffalign_command(folder, "cp", "mine.yaml", "copy.yaml")
    assert again.returncode == WRONG_INPUT
    assert "exists already" in again.stderr


def test_cp_of_a_shipped_recipe_keeps_its_comments(folder):
    name = min(shipped_recipes())
    assert diffalign_command(folder, "cp", name, ".").returncode == 0
    assert "# " in (folder / f"{name}.yaml").read_text()


def test_a_plugin_that_is_not_there(folder):
    done = diffalign_command(folder, "train", "recipe.yaml", "--plugin", "mine.py")
    assert done.returncode == WRONG_INPUT
    assert "mine.py" in done.stderr


def test_a_plugin_brings_a_reward_and_a_method(folder):
    (folder / "mine.py").write_text(
        "from typing import Literal\n"
        "from diffalign.finetune.config import METHODS, Settings\n"
        "from diffalign.rewards import REWARDS, as_reward\n"
        "class Mine(Settings):\n    name: Literal['mine'] = 'mine'\n    strength: float = 1\n"
        "METHODS['mine'] = Mine\n"
        "REWARDS.register('red')(lambda: as_reward(lambda images, *_: images[:, 0].mean((1, 2)), 'red'))\n"
    )
    (folder / "my-recipe.yaml").write_text(
        "extends: recipe.yaml\nmethod: {name: mine, strength: strong}\nrewards: {train: [red], heldout: [reddish]}\n"
    )
    done = diffalign_command(folder, "train", "my-recipe.yaml", "--plugin", "mine.py")
    assert done.returncode == WRONG_INPUT
    assert "2 things are wrong" in done.stderr
    assert "method.strength = strong" in done.stderr
    assert "reddish" in done.stderr
    assert "did you mean red?" in done.stderr


def test_sample_refuses_before_it_loads(folder):
    done = diffalign_command(
        folder, "sample", "model", "--prompts", "a red circle", "--out", "out", "--lora", "nowhere"
    )
    assert done.returncode == WRONG_INPUT
    assert "nowhere is missing" in done.stderr
    assert "LOADED []" in done.stdout
    done = diffalign_command(folder, "sample", "modell", "--prompts", "a red circle", "--out", "out")
    assert done.returncode == WRONG_INPUT
    assert "modell" in done.stderr


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_our_own_words_need_no_traceback_and_a_librarys_do():
    ours = raised(lambda: diffalign.registry.Registry("reward").get("x"))
    assert explained(ours) == (str(ours), WRONG_INPUT)
    recipe = RecipeError("x.yaml", [])
    assert explained(recipe) == (str(recipe), WRONG_INPUT)
    assert explained(raised(lambda: int("x"))) is None
    assert explained(raised(lambda: {}["x"])) is None
