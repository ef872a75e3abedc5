"""What benchmarks stand on: real sizes without a GPU, and that the ways that are compared for speed agree."""

from dataclasses import replace

import pytest
import torch

from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from tests.benchmarks import branched, real_size, real_size_methods, trajectory_throughput
from tests.benchmarks.real_models import REAL, TINY, build

PUBLISHED = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd35m": 2_243_171_520, "flux1": 11_901_408_320}


@pytest.mark.parametrize("name", REAL)
def test_the_configs_make_denoisers_of_the_published_sizes(name):
    assert real_size.parameters(REAL[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_flops_are_counted_for_prompts_of_the_shapes_that_the_policy_encodes(name):
    policy = Policy.wrap(build(TINY[name], "cpu"))
    found = {key: tensor.shape for key, tensor in policy.encode(["a red circle", "b"]).tensors.items()}
    assert found == {key: tensor.shape for key, tensor in real_size.encoded(TINY[name], 2).tensors.items()}


def gradient(model):
    """Gradient of an adapter on seeded weights, and the names of the denoiser's parameters that wait elsewhere."""
    torch.manual_seed(0)
    policy = Policy.wrap(build(model, "cpu"))
    policy.place("cpu", offload_blocks=model.offload)
    policy.add_lora(rank=2, alpha=2)
    policy.set_gradient_checkpointing(True)
    x = torch.ones(1, *policy.latent_shape())
    condition = policy.embed_guidance(policy.encode(["a red circle"]), model.guidance_scale)
    policy.evaluate(x, torch.ones(1), condition).square().sum().backward()
    elsewhere = [name for name, p in policy.denoiser.named_parameters() if p.is_meta]
    return {name: p.grad for name, p in policy.trainable().items()}, elsewhere


def test_offloaded_blocks_give_the_same_gradient():
    expected, none = gradient(replace(TINY["flux1"], offload=False))
    found, parked = gradient(TINY["flux1"])
    assert not none
    assert {name.split(".")[0] for name in parked} == {"transformer_blocks", "single_transformer_blocks"}
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert any(each.any() for each in expected.values())


def test_a_row_of_the_table_has_figures_and_one_that_cannot_be_says_why():
    shared = {"model": "sd15", "batch": 1, "steps": 2, "k": 1, "tiny": True}
    measured = shared | {"attention": "auto", "checkpointing": "block"}
    refused = shared | {"attention": "xformers", "checkpointing": "block"}
    cells = [cell | real_size.measure(cell) for cell in (measured, refused)]
    assert "attention" in cells[0]["kernels"]
    assert min(cells[0][name] for name in ("images_per_s", "peak_bytes", "matrix_rate")) > 0
    assert "xformers" in cells[1]["failed"]
    models = {"sd15": {"parameters": 1e6, "flops_per_image": 1e9}}
    heading, _, *rows = real_size.table({"cells": cells, "models": models}).splitlines()
    assert [row.count("|") for row in rows] == [heading.count("|")] * 2
    assert "xformers" in rows[1]


def test_the_methods_of_flows_have_figures_and_a_setting_that_cannot_be_says_why():
    shared = {"model": "sd35m", "at_once": 2, "steps": 2, "tiny": True}
    cells = [shared | {"method": method, "samples": 4} for method in ("flow_grpo", "flow_dpo")]
    cells = [cell | real_size.found(cell, real_size_methods.train) for cell in (*cells, cells[0] | {"samples": 2})]
    assert min(cell[name] for cell in cells[:2] for name in ("images_per_s", "peak_bytes", "flops_per_sample")) > 0
    # Of two steps with guidance four evaluations and four with a backward pass, of a pair's image one of each.
    assert 4 < cells[0]["flops_per_sample"] / cells[1]["flops_per_sample"] < 6
    assert "group_size = 1" in cells[2]["failed"]
    heading, _, *rows = real_size_methods.table(cells).splitlines()
    assert [row.count("|") for row in rows] == [heading.count("|")] * 3


def test_branches_are_those_that_run_whole_at_fewer_evaluations():
    found = branched.compare(Policy.wrap(tiny_sd()), parents=2, branches=3, steps=4, split=2, repeats=1)
    assert found["evaluations"] == pytest.approx((2 + 3 * 2) / (3 * 4))
    assert found["difference"] < 1e-4


def test_an_update_has_one_gradient_whatever_samples_and_steps_are_in_a_batch():
    trainer, named, part = trajectory_throughput.make_trainer(Policy.wrap(tiny_sd()), 2, 2, 3)
    table = trajectory_throughput.measure(trainer, named, part, [1, 4], [3], room=0)
    first = table[0]["gradient"]
    assert first.any()
    for row in table[1:]:
        torch.testing.assert_close(row["gradient"], first, rtol=0, atol=1e-3 * first.abs().max().item())
    lines = list(trajectory_throughput.told(table))
    assert ["rollout" in line for line in lines] == [True, True, False]
