"""A reward learned from pairs: what it recovers, that it repeats, what it states, and that it comes back from files."""

import pytest
import torch
import yaml
from torch.nn.functional import normalize

from diffalign import rewards
from diffalign.rewards import check_gradient
from diffalign.rewards.encoders import load_encoder
from diffalign.rewards.preference import (
    Pairs,
    PreferenceHead,
    PreferenceReward,
    encode_pairs,
    fit_preference,
    measure,
    write_reward,
)

WIDTH = 6
RED = "a red circle"


def toy(count, seed=0, sharpness=None, prompts=20):
    """Pairs whose better image is the one further along a known direction; labels are noisy at a finite sharpness."""
    generator = torch.Generator().manual_seed(seed)
    direction = normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(99)), dim=0)
    first, second, text = (normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for _ in range(3))
    margin = (first - second) @ direction
    chance = (margin > 0).float() if sharpness is None else torch.sigmoid(sharpness * margin)
    outcome = torch.where(torch.rand(count, generator=generator) < chance, 1, -1)
    return Pairs(first, second, text, outcome, tuple(f"prompt {i % prompts}" for i in range(count))), direction


def learned_direction(head):
    return normalize(head.output.weight[0, :WIDTH], dim=0)


def test_a_linear_head_recovers_the_direction_of_separable_choices():
    pairs, direction = toy(600)
    fitted = fit_preference(pairs, hidden=0, learning_rate=0.05, epochs=30)
    assert learned_direction(fitted.head) @ direction > 0.98
    assert fitted.validation["accuracy"] > 0.95
    assert fitted.head.output.weight[0, WIDTH : 2 * WIDTH].norm() < 0.1 * fitted.head.output.weight[0].norm()


def test_noisy_choices_give_their_scale_and_calibration():
    # r = 4 d.x truly, and the head scales x by sqrt(D): its weights must be 4 d / sqrt(D)
    pairs, direction = toy(4000, sharpness=4.0)
    fitted = fit_preference(pairs, hidden=0, learning_rate=0.02, weight_decay=0.0, batch_size=500, epochs=40)
    weight = fitted.head.output.weight[0, :WIDTH] * WIDTH**0.5
    assert (weight - 4 * direction).norm() < 0.6
    fresh, _ = toy(4000, seed=1, sharpness=4.0)
    figures = measure(fitted.head, fresh)
    assert figures["calibration_error"] < 0.04
    assert figures["accuracy"] == pytest.approx(figures["confidence"], abs=0.03)


def test_the_threshold_of_ties_is_the_one_that_their_share_says():
    # of samples that are equal a share q ties where theta = (1 + q) / (1 - q)
    share, count = 0.4, 500
    same = normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    outcome = torch.tensor(([0] * int(10 * share) + [1, -1] * 3) * (count // 10))
    pairs = Pairs(same, same, same, outcome, tuple(f"{i // 10}" for i in range(count)))
    fitted = fit_preference(pairs, likelihood="rao-kupper", hidden=0, learning_rate=0.05, epochs=30)
    assert fitted.head.threshold.exp().item() == pytest.approx(1.4 / 0.6, rel=0.02)
    assert fitted.training["accuracy"] == 0.5  # equal rewards are half right


def test_uncertainty_is_learned_where_choices_are_random():
    # The choice follows the direction for texts of one side, and is a coin for those of the other.
    pairs, _ = toy(3000, seed=2)
    coin = pairs.text[:, 0] > 0
    random = torch.where(torch.rand(3000, generator=torch.Generator().manual_seed(5)) < 0.5, 1, -1)
    pairs = Pairs(pairs.first, pairs.second, pairs.text, torch.where(coin, random, pairs.outcome), pairs.prompts)
    fitted = fit_preference(pairs, likelihood="gaussian", hidden=0, learning_rate=0.05, batch_size=300, epochs=25)
    _, log_variance = fitted.head(pairs.first, pairs.text)
    assert log_variance[coin].mean() > log_variance[~coin].mean() + 1


def test_the_same_seed_gives_the_same_head_and_another_seed_another():
    pairs, _ = toy(120, sharpness=4.0)
    one, two, other = (fit_preference(pairs, hidden=8, epochs=4, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), two.head.parameters(), strict=True))
    assert not torch.equal(one.head.output.weight, other.head.output.weight)
    state = torch.get_rng_state()
    fit_preference(pairs, hidden=8, epochs=1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's stream is left alone


def test_it_stops_at_the_best_validation_likelihood():
    pairs, _ = toy(40, sharpness=1.0)
    held, _ = toy(200, seed=7, sharpness=1.0)
    found = fit_preference(pairs, held, hidden=64, learning_rate=0.03, patience=5, epochs=100)
    assert found.epoch < 20
    longer = fit_preference(pairs, held, hidden=64, learning_rate=0.03, patience=100, epochs=30)
    assert longer.epoch == found.epoch or longer.validation["nll"] < found.validation["nll"]
    assert found.training["pairs"] == 40
    assert found.validation["nll"] == pytest.approx(measure(found.head, held)["nll"])


def test_pairs_split_by_prompt():
    pairs, _ = toy(100, prompts=10)
    rest, held = pairs.split(0.2, seed=0)
    assert not set(rest.prompts) & set(held.prompts)
    assert (len(rest), len(held)) == (80, 20)
    with pytest.raises(ValueError, match="one prompt cannot be split"):
        pairs.take(torch.tensor([0, 10])).split(0.2, seed=0)


def test_wrong_pairs_are_refused():
    pairs, _ = toy(10)
    ties = Pairs(pairs.first, pairs.second, pairs.text, torch.zeros(10), pairs.prompts)
    with pytest.raises(ValueError, match=r"10 of the pairs are ties, and gaussian knows none: take rao-kupper"):
        fit_preference(ties, likelihood="gaussian")
    with pytest.raises(ValueError, match="outcome 2: it is 1"):
        Pairs(pairs.first, pairs.second, pairs.text, torch.full((10,), 2), pairs.prompts)
    with pytest.raises(ValueError, match=r"\[9, 10\] rows"):
        Pairs(pairs.first[:9], pairs.second, pairs.text, pairs.outcome, pairs.prompts)


def test_a_head_of_equal_last_weights_is_the_cosine():
    head = PreferenceHead(WIDTH)
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.weight[0, 2 * WIDTH :] = 1 / WIDTH
        head.output.bias.zero_()
    pairs, _ = toy(5)
    cosine = torch.nn.functional.cosine_similarity(pairs.first, pairs.text)
    torch.testing.assert_close(head(pairs.first, pairs.text)[0], cosine)


@pytest.mark.parametrize("likelihood", ["bradley-terry", "rao-kupper", "gaussian"])
def test_a_trained_reward_comes_back_from_its_recipe(tiny_clip, tmp_path, likelihood):
    encoder = load_encoder(tiny_clip)
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [RED, "a blue square", "two big circles"] * 4
    pairs = encode_pairs(encoder, images[:12], images[12:], prompts, [1, -1] * 6, batch_size=5)
    fitted = fit_preference(pairs, likelihood=likelihood, hidden=4, epochs=2)
    file = write_reward(tmp_path, "mine", fitted, path=str(tiny_clip), licence="MIT", source="a toy")
    reward = rewards.load(file)
    assert isinstance(reward, PreferenceReward)
    score = reward(images[:12], prompts)
    expected, log_variance = fitted.head(pairs.first, pairs.text)
    torch.testing.assert_close(score.value, expected)
    assert (score.sigma is None) == (likelihood != "gaussian")
    if log_variance is not None:
        torch.testing.assert_close(score.sigma, (log_variance / 2).exp())
    assert f"{likelihood}, validation on" in yaml.safe_load(file.read_text())["source"]
    assert (check_gradient(reward, images[:2], prompts[:2]) > 0).all()
    torch.testing.assert_close(reward(images[3:5], prompts[3:5]).value, score.value[3:5])


def test_sigma_of_a_failed_score_is_nan_and_encoding_happens_once(tiny_clip):
    encoder = load_encoder(tiny_clip)
    reward = PreferenceReward(encoder, PreferenceHead(16, likelihood="gaussian"), name="unsure")
    calls = []
    encode, text = encoder.encode_images, encoder.encode_text
    encoder.encode_images = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    try:
        assert reward(images, [RED] * 3).sigma.isfinite().all()
        assert calls == [3]
        encoder.encode_text = lambda prompt: 1 / 0 if prompt == "bad" else text(prompt)
        score = reward(images, [RED, "bad", RED])
    finally:
        encoder.encode_images, encoder.encode_text = encode, text
    assert score.valid.tolist() == [True, False, True]
    assert score.sigma.isnan().tolist() == [False, True, False]


def test_a_head_that_does_not_fit_is_refused(tiny_clip, tmp_path):
    PreferenceHead(8).save(tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"reads embeddings of 8 numbers, and .* makes 16"):
        PreferenceReward(tiny_clip, tmp_path / "small.safetensors")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no preference head: it holds weight"):
        PreferenceReward(tiny_clip, tmp_path / "other.safetensors")
