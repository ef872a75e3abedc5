"""The experiment on digits, with untrained models and a few evaluations."""

import gzip
import json
import struct

import pytest
import torch

from tests.benchmarks import mnist, mnist_models

TWO = {"4": (4,), "even": (0, 2, 4, 6, 8)}


def made(kind, *size):
    torch.manual_seed(0)
    return kind(*size).eval().requires_grad_(False)


def space(seed=0):
    classifier = made(mnist_models.RewardClassifier)
    return mnist.MNIST(made(mnist_models.Denoiser, 16, 1), classifier, TWO, seed, steps=20)


def test_noise_is_standard_normal_and_of_its_address_alone():
    prompts, steps = torch.tensor([0, 1] * 40), torch.arange(80) % 9
    paths = [(k,) for k in range(80)]
    noise = space().noise("step", prompts, paths, steps)
    torch.testing.assert_close(space().noise("step", prompts[7:9], paths[7:9], steps[7:9]), noise[7:9])
    assert noise.shape == (80, 1, 14, 14)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float((noise[:, :, :7] * noise[:, :, 7:]).mean())) < 0.03  # the two halves of Box-Muller's pairs


def test_the_reward_of_a_set_is_its_likeliest_class():
    images, wanted = torch.randn(5, 1, 14, 14), space().wanted
    log_p = space().classifier(images).log_softmax(1)
    torch.testing.assert_close(mnist.log_probability(space().classifier, images, wanted[0]), log_p[:, 4])
    torch.testing.assert_close(mnist.log_probability(space().classifier, images, wanted[1]), log_p[:, ::2].amax(1))


@torch.no_grad()
def test_every_method_is_measured_and_what_is_there_is_not_measured_again(tmp_path, monkeypatch):
    pool = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    judge = mnist.Judge(made(mnist_models.JudgeClassifier), pool, space(), 8)
    results = {}
    mnist.measure(space(), judge, 200, results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert sorted(results) == sorted(f"0/200/{name}" for name in mnist.METHODS)
    for name, rows in results.items():
        assert all(row["evaluations"] <= 200 and row["found"] >= 10 for row in rows.values()), name
    monkeypatch.setattr(mnist, "search_class", None)
    mnist.measure(space(), judge, 200, results, tmp_path)
    text = mnist.table(results, "single digits", [200])
    assert all(f"| {name} | " in text for name in mnist.METHODS)
    results["0/200/rejection"] = {"4": {"seconds": 1.0}}
    monkeypatch.setitem(mnist.GROUPS, "single digits", ["4"])
    assert "rejection kept nothing in 1 of 1 runs" in mnist.verdict(results, "single digits", 200)
    with pytest.raises(ValueError, match=r"too few for --draws 300: raise --pool"):
        mnist.Judge(judge.network, pool, space(), 300)


def test_idx_files_are_read_as_digits(tmp_path):
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    images[:, 4:6, 6:8] = 255
    for name, array in (("images-idx3", images), ("labels-idx1", torch.tensor([7, 8, 9], dtype=torch.uint8))):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.numpy().tobytes()))
    digits, labels = mnist_models.read_digits(tmp_path)
    assert sorted(labels.tolist()) == [7, 8, 9]
    assert digits.shape == (3, 1, 14, 14)
    assert (digits == 1).nonzero().tolist() == [[k, 0, 2, 3] for k in range(3)]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">HBBI", 0, 9, 1, 0)))
    with pytest.raises(ValueError, match="type 0x9 where unsigned bytes"):
        mnist_models.read_digits(tmp_path)
