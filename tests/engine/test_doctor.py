"""The doctor passes what is well, and each of its checks fails where what it looks at is broken."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign import rewards
from diffalign.config import load_recipe
from diffalign.engine import doctor, footprint, machine
from diffalign.engine import run as run_module
from diffalign.engine.run import build
from diffalign.engine.stand_ins import BUILDERS, missing_reward, write_reward
from diffalign.finetune import trainer_class
from diffalign.laws import Normal, default_law
from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from diffalign.recipe_references import DRAWN
from diffalign.rollout import rollout

RECIPE = """
pipeline: {{path: {folder}/pipeline}}
method: {{name: reward_backprop, num_inference_steps: 4, guidance_scale: 3.0, gradient: {{kind: last_k, k: 1}}}}
rewards: {{train: [{reward}]}}
prompts: {{train: prompts.txt, validation: prompts.txt, test: prompts.txt}}
num_prompts_per_step: 8
max_train_steps: 20
checkpointing_steps: 5
output_dir: {folder}/run
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    tiny_sd().save_pretrained(folder / "pipeline", safe_serialization=True)
    reward = write_reward(missing_reward("clip-vit-l-14"), folder / "reward")
    (folder / "prompts.txt").write_text("a bad dog\na fine lake\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, reward=reward))
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def built(recipe):
    return build(recipe)


@pytest.fixture
def run(built):
    return replace(built)


def test_a_well_recipe_passes_everywhere_and_writes_nothing(recipe):
    findings = list(doctor.examine(recipe))
    assert [f.check for f in findings] == ["loading", *doctor.CHECKS]
    assert {f.verdict for f in findings} == {"PASS"}, findings
    assert not Path(recipe.output_dir).exists()


def test_the_doctor_writes_into_no_cache(monkeypatch, tmp_path):
    asked = []

    def stop(recipe):
        asked.append((recipe.method.cache, recipe.sft.cache))
        raise ValueError("enough")

    monkeypatch.setattr(doctor, "build", stop)
    changed = [f"method.cache={tmp_path / 'cache'}", f"sft={{images: a.jsonl, weight: 1, cache: {tmp_path / 'two'}}}"]
    (finding,) = doctor.examine(load_recipe("sd15-dpo", changed, absent=DRAWN))
    assert (finding.check, asked) == ("loading", [(None, None)])
    assert not list(tmp_path.iterdir())


def test_a_cache_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        changed = load_recipe("sd15-dpo", [f"method.cache={cache}"], absent=["method.pairs"])
        (finding,) = doctor.examine(changed)
        assert (finding.check, finding.verdict) == ("loading", "FAIL")
        assert f"cache = {cache}: {tmp_path / 'file'} is no folder" in finding.figure


def test_what_does_not_load_is_one_finding(recipe):
    broken = recipe.model_copy(update={"pipeline": recipe.pipeline.model_copy(update={"attention": "flush"})})
    (finding,) = doctor.examine(broken)
    assert finding.verdict == "FAIL"
    assert "attention 'flush' is unknown" in finding.figure


@pytest.mark.parametrize("name", BUILDERS)
def test_every_familys_own_call_draws_what_the_sampler_draws(name):
    """And nothing else: the same call with another guidance scale is as far away as the check must see."""
    pipe = BUILDERS[name]()
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = 8
    policy = Policy.wrap(pipe)
    own = pipe.scheduler
    with doctor._plain_scheduler(policy) as steps:
        schedule, noise = (
            policy.schedule(steps),
            normal(policy.latent_shape(), seed=0, purpose="initial", rows=[(0, 0)]),
        )
        where = {"rows": [(0, 0)], "seed": 0, "guidance_scale": 7.5}
        ours = rollout(policy, policy.encode(["a bad dog"]), default_law(schedule.kind), schedule, **where).latents
        theirs = doctor.call_pipeline(policy, "a bad dog", noise, steps, 7.5)
        other = doctor.call_pipeline(policy, "a bad dog", noise, steps, 6.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert (other - theirs).abs().max() > 1e-3 * theirs.abs().max()
    assert pipe.scheduler is own


def test_a_sampler_that_differs_fails(run, monkeypatch):
    predict = run.policy.evaluate
    monkeypatch.setattr(run.policy, "evaluate", lambda *args: predict(*args) * 1.01)
    assert doctor.parity(run).verdict == "FAIL"


@pytest.mark.parametrize(("size", "verdict"), [(1e-6, "WARN"), (1.0, "FAIL"), (float("nan"), "FAIL")])
def test_a_policy_that_does_not_repeat_itself_fails(run, monkeypatch, size, verdict):
    transition = doctor.transition

    def moved(*args, **kwargs):
        now = transition(*args, **kwargs)
        return Normal(now.mean + size * now.std.max(), now.std)

    monkeypatch.setattr(doctor, "transition", moved)
    assert doctor.ratio(run).verdict == verdict


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "PASS"), (2.0, "WARN"), (-1.0, "FAIL")])
def test_a_wrong_reward_gradient_is_seen(run, factor, verdict):
    run.train_reward = rewards.as_reward(
        lambda images, *_: Wrong.apply(images, factor).square().mean((1, 2, 3)), "mine"
    )
    assert doctor.reward_gradient(run).verdict == verdict


def test_an_adapter_that_is_not_the_identity_fails(run, monkeypatch):
    for name, parameter in run.policy.trainable().items():
        if "lora_B" in name:
            monkeypatch.setattr(parameter, "data", torch.full_like(parameter, 0.1))
    assert doctor.identity(run).verdict == "FAIL"


def test_memory_is_the_line_through_one_image_and_two(run, monkeypatch):
    peaks = iter([999, 1000, 1100])
    monkeypatch.setattr(footprint, "peak", lambda device, work: next(peaks))
    monkeypatch.setattr(footprint, "room", lambda device: 10_000)
    numbers = sum(p.numel() for p in run.trainer.parameters)
    found = footprint.footprint(run.trainer, run.prompts["train"])
    assert found == footprint.Footprint(8, 1000 + 7 * 100 + 2 * 4 * numbers, 100, 10_000)
    assert run.trainer.training.num_prompts_per_step == 8
    assert run.trainer.training.micro_batch_size == "auto"


def test_only_one_minibatch_has_gradients_at_once(built, monkeypatch):
    monkeypatch.setattr(footprint, "peak", lambda device, work: 1000)
    counts = {"num_prompts_per_step": 8, "group_size": 2, "num_minibatches": 4, "num_inference_steps": 4}
    trainer = trainer_class("ddpo")(built.policy, built.train_reward, **counts)
    assert footprint.footprint(trainer, built.prompts["train"]).images == trainer.images == 4


@pytest.mark.parametrize("method", ["ddpo", "raft", "dragon"])
def test_what_is_kept_of_all_samples_counts(built, monkeypatch, method):
    """Their encoded prompts, and of a trajectory five states and four Gaussians; in a peak of 1,000 bytes for one
    sample and twice what is kept more for two."""
    counts = {"num_prompts_per_step": 8, "group_size": 2, "num_minibatches": 4, "num_inference_steps": 4}
    trainer = trainer_class(method)(built.policy, built.train_reward, **counts)
    latent = 4 * math.prod(built.policy.latent_shape())
    prompt = sum(tensor.nbytes for tensor in built.policy.encode(["a red circle"]).tensors.values())
    kept = prompt + (9 if method == "ddpo" else 1) * latent
    peaks = iter([1000, 1000, 1000 + 3 * kept])

    def peak(device, work):
        work()
        return next(peaks)

    monkeypatch.setattr(footprint, "peak", peak)
    found = footprint.footprint(trainer, built.prompts["train"])
    moments = 2 * 4 * sum(p.numel() for p in trainer.parameters)
    assert found.per_image == 2 * kept
    assert found.peak == 1000 + 3 * 2 * kept + 15 * kept + moments


@pytest.mark.parametrize(
    ("found", "verdict", "remedy"),
    [
        (footprint.Footprint(8, 900, 100, 1000), "PASS", ""),
        (footprint.Footprint(8, 950, 100, 1000), "WARN", "set micro_batch_size=7 "),
        (footprint.Footprint(8, 1600, 100, 1000), "FAIL", "set micro_batch_size=1 "),
        (footprint.Footprint(8, 1800, 100, 1000), "FAIL", "set gradient_checkpointing=block"),
    ],
)
def test_too_little_memory_is_told_with_what_would_fit(run, monkeypatch, found, verdict, remedy):
    monkeypatch.setattr(doctor, "footprint", lambda *_: found)
    finding = doctor.memory(run)
    assert finding.verdict == verdict
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize(("room", "size"), [(10_000, 8), (1000, 4), (600, 3), (400, 1), (100, 1)])
def test_the_micro_batch_is_in_equal_parts_that_fit(run, monkeypatch, tmp_path, room, size):
    monkeypatch.setattr(run_module, "footprint", lambda *_: footprint.Footprint(8, 1000, 100, room))
    run.output_dir, kept = tmp_path, run.trainer.training
    try:
        run_module.settle_micro_batch(run)
        assert run.trainer.training.micro_batch_size == size
        # A resumed run takes the same, whatever would fit now.
        run_module.checkpoint(run)
        run.trainer.training = kept
        run.recipe = run.recipe.model_copy(update={"resume_from_checkpoint": "latest"})
        run_module.resume(run)
        assert run.trainer.training.micro_batch_size == size
    finally:
        run.trainer.training = kept


def test_the_micro_batch_is_that_of_the_process_with_least_room(run, monkeypatch):
    monkeypatch.setattr(run_module, "footprint", lambda *_: footprint.Footprint(8, 1000, 100, 10_000))
    monkeypatch.setattr(run_module, "gather_object", lambda mine: [*mine, 4])
    kept = run.trainer.training
    try:
        run_module.settle_micro_batch(run)
        assert run.trainer.training.micro_batch_size == 4
    finally:
        run.trainer.training = kept


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_some_work_is_what_it_held():
    cpu = torch.device("cpu")
    without = footprint.peak(cpu, lambda: None)
    held = footprint.peak(cpu, lambda: torch.ones(64 * 2**18))  # 64 MiB, given back afterwards
    after = footprint.peak(cpu, lambda: None)
    assert abs(held - without - 2**26) < 2**23
    assert after < held - 2**25


def test_disk_counts_the_checkpoints_that_are_kept_and_one_more(run, monkeypatch):
    size = 3 * 4 * sum(p.numel() for p in run.trainer.parameters)
    for free, verdict in ((6 * size, "PASS"), (4 * size, "WARN"), (2 * size, "FAIL")):
        monkeypatch.setattr(doctor, "free_disk", lambda path, free=free: free)
        assert doctor.disk(run).verdict == verdict


def test_the_machine_is_told():
    told = dict(machine.facts())
    assert "torch " in told["versions"]
    assert "float32: yes" in told["cpu types"]
    assert "GiB" in told["memory"]
    if not torch.cuda.is_available():
        assert "flash_attention_for_cpu_backward" in told["attention native"], "forward and backward"
        assert "plain matrix products" in told["attention _native_math"]
