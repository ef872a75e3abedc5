"""The shipped noise-aware reward tells what its card says it tells, in noise, and its gradient points there."""

import json
import re

import numpy as np
import pytest
import torch

from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.registry import data_root
from diffalign.rewards.noisy import Choices, NoisyReward, margin, noised, ranked_right, tie_margins
from diffalign.zoo import noisy
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.denoise import scaled
from diffalign.zoo.render import render
from diffalign.zoo.world import one_edit, sample_scene

FOLDER = data_root() / "zoo" / "shapes-noisy-reward"
SCENES = 24


@pytest.fixture(scope="module")
def policy():
    found = Policy.from_pretrained("zoo:shapes-sd3")
    found.set_max_sequence_length(16)
    return found


@pytest.fixture(scope="module")
def reward(policy):
    return NoisyReward.load(FOLDER, policy)


@pytest.fixture(scope="module")
def renders(policy):
    """A right render and one with one wrong fact of each of some new scenes: (latents, values, captions)."""
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, "test", objects=2) for _ in range(SCENES)]
    wrong = [edits[rng.integers(len(edits))] for edits in (one_edit(s)["color"] + one_edit(s)["shape"] for s in scenes)]
    images = torch.stack([render(scenes, rng), render(wrong, rng)], 1)
    with torch.no_grad():
        latents = scaled(policy.pipe.vae, autoencoder.encode(policy.pipe.vae, images.flatten(0, 1)))
    right = torch.tensor([1.0, 0.0]).expand(SCENES, 2)
    values = torch.stack([right, noisy.warmth(images.flatten(0, 1)).view(SCENES, 2)], -1)
    return latents.view(SCENES, 2, *latents.shape[1:]), values, [scene.caption for scene in scenes]


def card():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))


def test_it_tells_right_from_wrong_and_warm_from_cold_in_noise(reward, renders):
    choices = Choices.from_values(*renders, torch.tensor([0.5, 0.005]))
    for sigma, preference in ((0.0, 0.6), (0.4, 0.55)):
        right, decided = ranked_right(reward, choices, sigma)
        share = right.sum(0) / decided.sum(0)
        assert share[0] > preference, sigma
        assert share[1] > 0.8, sigma


def test_along_its_gradient_a_noisy_latent_becomes_warmer(policy, reward, renders):
    latents, _, captions = renders
    level = policy.schedule(10).level(torch.full((8,), 5))
    noise = normal(policy.latent_shape(), seed=0, purpose="test", rows=[(i,) for i in range(8)])
    x, level = noised(reward, latents[:8, :1], level, noise)
    condition = policy.encode(captions[:8])
    x.requires_grad_()
    score = reward(x, level, condition, weights={"warmth": 1.0})
    (gradient,) = torch.autograd.grad(score.sum(), x)
    step = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        before, after = (policy.predict(at, level, condition).x0 for at in (x, x + 4.0 * step))
        gain = noisy.warmth(policy.decode(after)) - noisy.warmth(policy.decode(before))
    assert (gain > 0).float().mean() >= 0.75
    assert gain.mean() > 0.003


def test_the_card_states_both_rewards_at_every_level():
    stated = card()
    for name in noisy.OBJECTIVES:
        aware, clean = (stated[name][way] for way in ("noise-aware", "clean-trained"))
        assert list(aware) == list(clean) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        assert aware["1"] == clean["1"] == 0.5  # nothing but the same noise on both sides
        assert aware["0.6"] > clean["0.6"]


@pytest.mark.verify
def test_the_figures_of_the_card_are_found_again(policy, reward, tmp_path, monkeypatch):
    monkeypatch.setitem(noisy.PROMPTS, "test", 32)
    drawn = noisy.collect(policy, "test", tmp_path)
    choices = noisy.choices(drawn, "test", tie_margins(drawn["values"], noisy.TIES), mistakes=False)
    assert margin(drawn["values"]).shape == (32, 15, 2)
    stated = card()
    for sigma in (0.0, 0.4, 0.8):
        right, decided = ranked_right(reward, choices, sigma)
        for name, share in zip(noisy.OBJECTIVES, (right.sum(0) / decided.sum(0)).tolist(), strict=True):
            assert share == pytest.approx(stated[name]["noise-aware"][f"{sigma:g}"], abs=0.1), (name, sigma)
