"""Contract: gradients are equal across ranks, and two processes are one process with both their batches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import start

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(out, world, method="sd", weights="whole"):
    out.mkdir()
    for status, errors in start(SCRIPT, [out, method, weights], world):
        assert status == 0, errors
    return [load_file(out / f"{r}.safetensors") for r in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("processes") / "two", 2)


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(tmp_path, two):
    assert_one(two, launch(tmp_path / "one", 1))


@pytest.mark.verify
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["ddpo", "flat", "sft", "prdp", "raft", "nft", "dragon", "dragon_kto"])
def test_two_processes_equal_one_on_their_own_samples(tmp_path, method):
    """Advantages by the history of all processes, pairs counted and weights made over them, where they have not equally
    many. DRAGON's set is that of both, swapped in the order of the prompts, and KTO's z is of all."""
    two = launch(tmp_path / "two", 2, method)
    assert_one(two, launch(tmp_path / "one", 1, method))
    if method == "ddpo":
        kept = [two[0][f"history/{number}"] for number in range(4)]
        assert [len(rewards) for rewards in kept] == [6, 6, 6, 0]  # every score of the last failed
        assert min(float(rewards.std()) for rewards in kept[:3]) > 1e-3
    if method == "nft":
        old = {name: tensor for name, tensor in two[0].items() if name.startswith("old/")}
        assert any(not torch.equal(tensor, two[0][name.removeprefix("old/")]) for name, tensor in old.items())


@pytest.mark.slow
def test_frozen_weights_that_are_divided_train_the_same_adapter(tmp_path, two):
    compare(two, launch(tmp_path / "sharded", 2, weights="sharded"))


@pytest.mark.verify
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["sd3", "ddpo", "sft", "prdp"])
def test_frozen_weights_are_divided_too(tmp_path, method):
    """Of a transformer; and where one process has samples that train nothing, and makes the others' calls with them."""
    compare(launch(tmp_path / "whole", 2, method), launch(tmp_path / "sharded", 2, method, "sharded"))


def assert_one(two, one):
    first, second = two
    (one,) = one
    assert first.keys() == second.keys() == one.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Sums of float32 in another order; Adam's first steps divide by the gradient's own size.
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=2e-6, msg=name)


def compare(whole, sharded):
    assert sum(int(rank["held"]) for rank in sharded) == int(whole[0]["held"])
    for rank in sharded:
        for name in rank.keys() - {"held"}:
            torch.testing.assert_close(rank[name], whole[0][name], rtol=1e-3, atol=2e-6, msg=name)
