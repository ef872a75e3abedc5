"""The examples of README.md, CONTRIBUTING.md and the guide run as they stand."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

import diffalign
from diffalign import rewards
from diffalign.cli.train import load_plugin
from diffalign.config import Recipe, load_recipe
from diffalign.data import Prompt
from diffalign.finetune import METHODS, TRAINERS, trainer_class
from diffalign.laws import DDIM, FlowODE, FlowSDE
from diffalign.policies import POLICIES, Policy
from diffalign.policies.tiny import finish, t5_tokenizer, tiny_sd, vae
from diffalign.rollout import log_probs, rollout
from tests.policies.contract import Family
from tests.policies.test_contract import PROPERTIES

ROOT = Path(__file__).parent.parent


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Runs the only example in Python of a file, in a folder that holds the assets; returns its names."""

    def run(file):
        (code,) = blocks(file, "python")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "assets").symlink_to(ROOT / "assets")
        space = {}
        exec(compile(code, file, "exec"), space)
        return space

    return run


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, example):
    space = example("README.md")
    assert len(space["history"]) == 2
    assert (tmp_path / "runs/warm/pytorch_lora_weights.safetensors").is_file()
    assert space["image"].size == (64, 64)


def test_the_search_runs():
    (code,) = [block for block in blocks("README.md", "python no-run") if "da.search" in block]
    space = {"da": diffalign, "policy": Policy.wrap(tiny_sd()), "reward": lambda images, *_: images[:, 0].mean((1, 2))}
    exec(compile(code.replace("nfe=2000", "nfe=200"), "README.md", "exec"), space)  # two chains of 50 guided steps
    assert space["found"].best_image is not None
    assert 100 < space["found"].ledger.denoiser_evaluations <= 200


def test_the_recipe_for_a_real_checkpoint_is_valid(tmp_path):
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "my").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "my" / f"{split}.txt").write_text("a horse on the moon\n")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.evaluation.guidance_scale == 7.5


def test_the_recipe_of_the_guide_is_valid(tmp_path):
    recipe = blocks("docs/guide/recipes.md", "yaml")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "recipe.yaml").evaluation.num_inference_steps == 10


def test_the_example_of_the_guide_to_rewards_runs(example):
    space = example("docs/guide/rewards.md")
    assert set(space["score"].parts) == {"shapes-clip", "warm"}
    assert space["score"].valid.all()


def test_the_reward_recipes_of_the_guide_are_valid(tmp_path):
    asked, published, mixed = blocks("docs/guide/rewards.md", "yaml")
    assert yaml.safe_load(asked)["rewards"]["train"][1]["weight"] == 0.1
    (tmp_path / "published.yaml").write_text(published)
    assert rewards.read_recipe(tmp_path / "published.yaml").type == "aesthetic"
    (tmp_path / "mixed.yaml").write_text(mixed)
    reward = rewards.load(tmp_path / "mixed.yaml")
    score = reward(torch.rand(2, 3, 64, 64), ["a red circle", "a blue star"])
    assert {"shapes-clip", "shapes-preference", "scaled-clip", "scaled-preference"} <= set(score.parts)
    torch.testing.assert_close(score.value, torch.minimum(score.parts["scaled-clip"], score.parts["scaled-preference"]))


def test_the_example_of_the_guide_to_scoring_runs(tmp_path, example):
    space = example("docs/guide/score.md")
    assert space["result"].rows == len(list((ROOT / "assets" / "demo").glob("*.png")))
    assert (tmp_path / "runs/sizes.csv").is_file()


def test_the_example_of_the_guide_to_searching_runs(example):
    found = example("docs/guide/search.md")["found"]
    assert found.ledger.denoiser_evaluations <= 80
    assert len(found) >= 8


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Loads the example of the two files whose first line names that file, by the door of `--plugin`."""
    trainer_class("ddpo")  # loads all methods, whose registration would go with the patch
    for registry in (rewards.REWARDS, POLICIES, TRAINERS):
        monkeypatch.setattr(registry, "_things", dict(registry._things))
    methods = dict(METHODS)

    def load(name):
        plugins = blocks("README.md", "python plugin") + blocks("CONTRIBUTING.md", "python")
        (code,) = [block for block in plugins if block.startswith(f'"""{name}:')]
        file = tmp_path / name
        file.write_text(code, encoding="utf-8")
        load_plugin(file)
        return sys.modules[f"diffalign_plugin_{file.stem}"]

    yield load
    METHODS.clear()
    METHODS.update(methods)
    Recipe.model_rebuild(force=True)
    for name in [name for name in sys.modules if name.startswith("diffalign_plugin_")]:
        del sys.modules[name]


def test_the_example_of_a_reward_is_found_by_name_and_proves_its_gradient(plugin):
    plugin("contrast.py")
    recipe = load_recipe("shapes-sd-alignprop", ["rewards.train=[contrast]"])
    reward = rewards.load(recipe.rewards.train[0].name)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    images[1] = (torch.arange(192).reshape(3, 8, 8) % 2).double()
    score = reward(images, ["", ""])
    assert score.value[1].item() == pytest.approx(0.5 * (192 / 191) ** 0.5)
    assert (rewards.check_gradient(reward, images, ["", ""]) > 0).all()


def test_the_example_of_a_trainer_takes_the_score_functions_gradient(plugin):
    """Of two images a prompt, scored 1 and 0, the gradient of the densities weighs 1 and -1."""
    (code,) = blocks("README.md", "python plugin")
    assert len(code.splitlines()) < 40
    module = plugin("reinforce.py")
    recipe = load_recipe("shapes-sd-ddpo", ["method={name: reinforce, eta: 0.5}"])
    assert recipe.method.eta == 0.5
    assert trainer_class(recipe.method.name) is module.Reinforce

    first = rewards.as_reward(lambda images, *_: torch.arange(len(images)) % 2 == 0, "first", differentiable=False)
    settings = {"num_prompts_per_step": 2, "group_size": 2, "num_inference_steps": 3, "guidance_scale": 1.0}
    trainer = module.Reinforce(Policy.wrap(tiny_sd(torch.float64)), first, reduction="sum", **settings)
    ((sums, cost),) = trainer.updates([Prompt("a bad dog", 7), Prompt("a fine lake", 8)])
    assert (sums["reward"], sums["reward_valid"]) == (2, 4)
    assert (cost.denoiser_evaluations, cost.backward_passes, cost.reward_calls) == (3 * 4 * 3, 4 * 3, 4)

    policy = trainer.policy
    condition, schedule = policy.encode(["a bad dog", "a bad dog", "a fine lake", "a fine lake"]), policy.schedule(3)
    chain = {"law": DDIM(1.0), "schedule": schedule, "guidance_scale": 1.0}
    rows = [(7, 0, 0), (7, 0, 1), (8, 0, 0), (8, 0, 1)]
    taken = rollout(policy, condition, rows=rows, seed=0, record_states=True, **chain)
    weights = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    objective = -(weights * log_probs(policy, taken, condition, reduction="sum", **chain)).sum() / 4
    expected = torch.autograd.grad(objective, trainer.parameters)
    assert any(gradient.any() for gradient in expected)
    for parameter, gradient in zip(trainer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def tiny_auraflow(dtype=torch.float32):
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    # So that attention, whose gates are functions of the time, moves the pixels.
    torch.nn.init.normal_(transformer.time_step_proj.linear_2.weight)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return finish(AuraFlowPipeline(t5_tokenizer(), encoder, vae(), transformer, scheduler), dtype)


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_example_of_a_family_keeps_the_contract(plugin, name):
    module = plugin("auraflow.py")
    assert type(Policy.wrap(tiny_auraflow())) is module.AuraFlow
    print(PROPERTIES[name](Family(tiny_auraflow, FlowODE(), FlowSDE())))


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffalign.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == diffalign.__version__
