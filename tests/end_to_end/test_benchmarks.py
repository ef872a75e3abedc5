"""What the benchmark of real sizes stands on, without a GPU: its configs, its offloading, and a row of its table."""

from dataclasses import replace

import pytest
import torch

from diffalign.policies import Policy
from tests.benchmarks import real_size
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
