"""`shapes-turbo` draws in one step, listens to its noise, and is taught by what it says it is."""

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.laws import FlowODE
from diffalign.policies import Policy
from diffalign.registry import data_root
from diffalign.zoo import pairs, turbo
from diffalign.zoo.text import tokenize

PROMPTS = ["a small red circle left of an orange star", "a blue square"]


def loaded(name):
    pipeline = DiffusionPipeline.from_pretrained(data_root() / "zoo" / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def policy():
    policy = Policy.wrap(loaded("shapes-turbo"))
    policy.set_max_sequence_length(16)
    return policy


@pytest.fixture(scope="module")
def teacher():
    return turbo.of_pipeline(loaded("shapes-sd3"))


def noise(count, seed=0):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def one_step(policy, x, prompts):
    schedule = policy.schedule(1)
    prediction = policy.predict(x, schedule.level(0).expand(len(x)), policy.encode(prompts))
    return FlowODE().step(prediction, schedule.level(1).expand(len(x))).mean


def test_a_policys_one_step_is_the_pipelines_own_call(policy):
    x = noise(2)
    own = policy.pipe(
        PROMPTS, latents=x, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=16, output_type="pt"
    ).images
    with torch.no_grad():
        torch.testing.assert_close(policy.decode(one_step(policy, x, PROMPTS)), own, atol=1e-5, rtol=0)


def test_the_length_of_the_silent_t5_changes_little(policy):
    settings = {"latents": noise(2), "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    short, long = (policy.pipe(PROMPTS, max_sequence_length=n, **settings).images for n in (16, 256))
    assert (short - long).abs().mean() < 0.01


def test_other_noise_is_another_layout(policy):
    with torch.no_grad():
        images = policy.decode(one_step(policy, noise(6), PROMPTS[1:] * 6))
    painted = (images - images[:, :, :1, :1]).abs().amax(1) > 0.3
    both, either = (painted[0] & painted[1:]).sum((1, 2)), (painted[0] | painted[1:]).sum((1, 2))
    assert (both / either).mean() < 0.7


def test_the_gradient_reaches_the_noise_and_is_that_of_finite_differences(policy):
    x = noise(1).requires_grad_()

    def brightness(x):
        return policy.decode(one_step(policy, x, PROMPTS[:1])).mean()

    (gradient,) = torch.autograd.grad(brightness(x), x)
    direction = gradient / gradient.norm()
    step = 0.05
    with torch.no_grad():
        difference = (brightness(x + step * direction) - brightness(x - step * direction)) / (2 * step)
    assert difference == pytest.approx(float(gradient.norm()), rel=0.05)


def test_the_teachers_flow_is_solved_as_its_pipeline_does_on_even_sigmas(teacher):
    pipeline, x = loaded("shapes-sd3"), noise(2)
    own = pipeline(
        PROMPTS,
        latents=x,
        sigmas=[1 - i / pairs.STEPS for i in range(pairs.STEPS)],
        guidance_scale=pairs.GUIDANCE,
        max_sequence_length=16,
        output_type="latent",
    ).images
    teacher.train()
    ours = pairs.solve(teacher, x, tokenize(teacher.tokenizer, PROMPTS))
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


def test_pairs_are_made_once_and_those_that_are_missing_again(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", 2)
    monkeypatch.setattr(pairs, "STEPS", 1)
    first = pairs.cached(teacher, tmp_path, 4)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    (tmp_path / "000002.safetensors").unlink()
    again = pairs.cached(teacher, tmp_path, 4)
    assert (tmp_path / "000000.safetensors").stat().st_mtime_ns == times["000000.safetensors"]
    assert all(torch.equal(vars(first)[name], vars(again)[name]) for name in vars(first))
    assert not torch.equal(first.noise[:2], first.noise[2:])


def test_the_students_clock_begins_where_the_teacher_listens(teacher):
    student = turbo.of_pipeline(loaded("shapes-sd3"))
    turbo.shift_clock(student)
    context, pooled = teacher.encode(tokenize(teacher.tokenizer, PROMPTS[:1]))
    with torch.no_grad():
        for model in (teacher, student):
            model.eval()
        wanted = teacher.transformer(noise(1), context, pooled, torch.tensor([turbo.START])).sample
        made = student.transformer(noise(1), context, pooled, torch.tensor([1000.0])).sample
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
