"""A search from recipe to report: what stands in its files, what ends it, and how it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign import media, rewards
from diffalign.engine import search as engine
from diffalign.engine.evaluate import sample_images
from diffalign.engine.run import Interrupted
from diffalign.engine.search import read, search
from diffalign.engine.search_results import read_rows
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from diffalign.rewards import REWARDS
from diffalign.search import Search
from diffalign.search_recipe import load_search_recipe
from tests.engine.searches import MOMENTS, arm, colour, register, write

HERE = Path(__file__).parent
CLOCKS = {"seconds", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def policy():
    return Policy.wrap(tiny_sd())


@pytest.fixture
def recipe(tmp_path, known):
    """The small recipe with overrides."""
    file = write(tmp_path)
    return lambda *overrides: load_search_recipe(file, [f"output_dir={tmp_path}/run", *overrides])


@pytest.fixture(scope="module")
def known():
    """The rewards of the recipe have names, until the last test here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REWARDS, "_things", dict(REWARDS._things))
        register()
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, known, policy):
    """The folder of a search that was let be, as the recipe stands."""
    folder = tmp_path_factory.mktemp("whole")
    return search(load_search_recipe(write(folder), [f"output_dir={folder}/run"]), policy).parent


def without_clocks(tree):
    if isinstance(tree, dict):
        return {key: without_clocks(value) for key, value in tree.items() if key not in CLOCKS}
    return tree


def contents(folder):
    """What a search leaves that no clock has touched, by file."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("pipeline", "output_dir"):  # where they lie
        config.pop(key)
    found = {"rows": [without_clocks(row) for row in read_rows(folder)], "config": config}
    for path in sorted(folder.rglob("*.png")):
        found[path.name] = path.read_bytes()
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        tensors["pool/cost"] = tensors["pool/cost"][:2]
        found[path.name] = {name: tensor.tolist() for name, tensor in tensors.items() if name != "seconds"}
    return found


@pytest.fixture
def unreported(monkeypatch):
    """Nothing is drawn, which takes as long as the search."""
    monkeypatch.setattr(engine, "write_search_report", lambda folder, *_: folder / "report.html")


class Killed(BaseException):
    """As a SIGKILL leaves the files, in a process that goes on."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_search_that_ended_anywhere_is_gone_on_with_to_equal_files(
    recipe, policy, whole, unreported, monkeypatch, moment
):
    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        arm(moment, kill, patch.setattr)
        with pytest.raises(Killed):
            search(recipe(), policy)
    assert_equal(search(recipe(), policy).parent, whole)


def assert_equal(folder, whole):
    told = contents(whole)
    assert len(told["rows"]) == 3
    assert len(told) == 2 + 3 * 3
    assert contents(folder) == told
    names = {"config.yaml", "images", "results.jsonl", "traces"}
    assert {path.name for path in folder.iterdir()} - {"report.html"} == names


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_a_killed_search_is_gone_on_with_to_equal_files(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    command = [sys.executable, str(HERE / "searches.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for moment in MOMENTS:
        assert_equal(tmp_path / moment, tmp_path / "whole")


def test_what_a_search_leaves(recipe, policy, whole):
    asked, rows = recipe(), read_rows(whole)
    assert [row["prompt"] for row in rows] == asked.prompts
    plain = sample_images(policy, read(asked), num_inference_steps=4, guidance_scale=2.0)
    judges = {name: rewards.as_reward(colour(channel), name) for channel, name in ((0, "red"), (2, "blue"))}
    for i, row in enumerate(rows):
        pixels = {side: media.from_pil([media.open_image(whole / row["images"][side])])
                  for side in ("base", "found")}  # fmt: skip
        assert torch.equal(media.to_uint8(pixels["base"][0]), plain.images[i])
        for side, image in pixels.items():
            scores = {name: judge(image, [row["prompt"]]).value.item() for name, judge in judges.items()}
            assert row[f"{side}_reward"] == pytest.approx(scores["red"], abs=1e-6)
            assert row["heldout"]["blue"][side] == pytest.approx(scores["blue"], abs=1e-6)
        trace = load_file(whole / row["trace"])
        assert row["found_reward"] == trace["rewards"].max().item()
        assert row["nfe"] == trace["nfe"][-1] <= 60
        assert row["reward_calls"] == row["decodes"] == row["results"] + row["reward_failures"]
        assert row["apart"]["nfe"] == 8
        assert row["apart"]["reward_calls"] == 3  # both rewards of the base, the held-out one of what was found
        assert trace["pool/cost"].tolist()[:2] == [row["pool"]["nfe"], row["pool"]["reward_calls"]] == [56, 7]
        children = (trace["tree/parent"] == 0).sum().item()
        assert 1 < children < row["results"]  # it branches below the root too
        assert trace["tree/value"].nan_to_num(-1).max() == row["found_reward"]
    for words in ("selected by", "blue", "a fine lake", "best of n", "Trees", "60 denoiser evaluations"):
        assert words in (whole / "report.html").read_text(encoding="utf-8")


def test_prompts_side_by_side_are_those_one_at_a_time(recipe, policy, whole, unreported):
    alone = search(recipe("num_prompts=2", "report_pool=false", "prompts_per_batch=1"), policy).parent
    for one, other in zip(read_rows(alone), read_rows(whole)[:2], strict=True):
        assert one["found_reward"] == pytest.approx(other["found_reward"], abs=1e-6)
        assert one["nfe"] == other["nfe"]
        assert "pool" not in one


def test_interrupted_it_leaves_what_is_done_and_goes_on(recipe, policy, tmp_path, unreported, monkeypatch):
    import signal

    stream, calls = Search.stream, []

    def interrupting(self, space, budget):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        yield from stream(self, space, budget)

    asked = recipe("report_pool=false")
    with monkeypatch.context() as patch:
        patch.setattr(Search, "stream", interrupting)
        with pytest.raises(Interrupted, match="the same command goes on"):
            search(asked, policy)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert len(before.splitlines()) == 2
    with (tmp_path / "run" / "results.jsonl").open("ab") as file:
        file.write(b'{"id": 2, "prompt": "a c')  # as a power cut would leave it
    search(asked, policy)
    after = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["id"] for line in after.splitlines()] == [0, 1, 2]


def test_another_recipe_is_refused_in_the_same_folder(recipe, policy, tmp_path, unreported):
    search(recipe("num_prompts=1", "report_pool=false"), policy)
    with pytest.raises(ValueError, match=r"holds another search: budget.nfe was 60 and is 80; choose another"):
        search(recipe("num_prompts=1", "report_pool=false", "budget.nfe=80"), policy)
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name":  "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"the file of pipeline.path has changed"):
        search(recipe("num_prompts=1", "report_pool=false"), policy)


def test_a_prompt_without_any_score_is_a_row_and_a_count(recipe, policy, tmp_path):
    REWARDS.register("never")(lambda: rewards.as_reward(lambda images, *_: images.mean((1, 2, 3)) * torch.nan, "never"))
    page = search(recipe("num_prompts=2", "rewards.train=[never]", "report_pool=false"), policy)
    for row in read_rows(page.parent):
        assert row["found_reward"] is None
        assert row["base_reward"] is None
        assert row["heldout"]["blue"]["found"] is None
        assert row["heldout"]["blue"]["base"] is not None
        assert row["reward_failures"] == row["reward_calls"] > 0
        assert set(row["images"]) == {"base"}
    assert "every score failed, left out above: 2" in page.read_text(encoding="utf-8")


def test_the_plain_image_has_the_size_that_is_searched(recipe, policy, unreported):
    folder = search(recipe("num_prompts=1", "height=24", "width=32", "report_pool=false"), policy).parent
    (row,) = read_rows(folder)
    assert {media.open_image(folder / place).size for place in row["images"].values()} == {(32, 24)}


@pytest.mark.parametrize("method", ["best_of_n", "importance", "tree_sampling"])
def test_every_method_goes_from_recipe_to_report(recipe, policy, method):
    page = search(recipe("num_prompts=1", f"method={{name: {method}}}", "report_pool=false"), policy)
    (row,) = read_rows(page.parent)
    assert (row["log_z"] is None) == (method == "best_of_n")
    assert ("best of n" in page.read_text(encoding="utf-8")) == (method != "tree_sampling")
