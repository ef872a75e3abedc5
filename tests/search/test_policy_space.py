"""Pipelines as spaces: the chain is the rollout's, and every family goes through the methods that its law allows."""

import itertools

import pytest
import torch

from diffalign import media
from diffalign.data import Prompt
from diffalign.policies import Policy, tiny, tiny_families
from diffalign.rewards import as_reward
from diffalign.rewards.noisy import NoisyReward
from diffalign.rollout import rollout
from diffalign.search import METHODS, BestOfN, PolicySpace, TreeSearch, search_class
from diffalign.search.config import ChainConfig
from diffalign.search.space import Rows

STEPS = 4
FAMILIES = {
    "SD": (tiny.tiny_sd, {}),
    "SDXL": (tiny_families.tiny_sdxl, {}),
    "SD3": (tiny.tiny_sd3, {}),
    "FLUX.1-dev": (tiny_families.tiny_flux, {}),
    "FLUX.1-schnell": (tiny_families.tiny_schnell, {"guidance_scale": 0.0, "law": "consistency"}),
    "LCM": (tiny_families.tiny_lcm, {"law": "consistency"}),
}
PROMPTS = [Prompt("a bad dog", "dog"), Prompt("a fine lake", "lake")]


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    build, chain = FAMILIES[request.param]
    return Policy.wrap(build()), {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
    } | chain


def test_its_samples_are_those_of_a_rollout(family):
    policy, chain = family
    search = BestOfN(policy, redness, wave=2, **chain)
    found = search.search(PROMPTS, reward_calls=3)
    space = PolicySpace(policy, redness, PROMPTS, search.chain)
    trajectory = rollout(
        policy,
        policy.encode([p.text for p in PROMPTS for _ in range(3)]),
        space.law,
        space.schedule,
        rows=[(p.id, k) for p in PROMPTS for k in range(3)],
        seed=0,
        guidance_scale=chain["guidance_scale"],
        height=16,
        width=16,
    )
    results = torch.cat([each.results for each in found])
    assert torch.allclose(results, trajectory.latents, atol=1e-4)
    assert sum(each.ledger.denoiser_evaluations for each in found) == trajectory.ledger.denoiser_evaluations
    pixels = media.quantise(policy.decode(results))
    rewards = redness(pixels, [], []).reshape(2, 3)
    assert torch.allclose(torch.stack([each.rewards for each in found]), rewards.double())
    for prompt, each in enumerate(found):
        image = media.to_uint8(pixels.reshape(2, 3, *pixels.shape[1:])[prompt, each.best])
        assert torch.equal(each.best_image, image)
        assert each.ledger.decodes == each.ledger.reward_calls == 3


TREE = {"leaf_batch": 3, "branch_levels": [0.25, 0.5]}
BLACK_BOX = {
    "importance": {},
    "tree_sampling": TREE,
    "tree_search": TREE,
    "smc": {},
    "svdd": {"num_children": 3},
    "gibbs": {"num_particles": 3},
}
GRADIENT = {
    "reno": {},
    "dno": {},
    "guidance": {"kind": "dps"},
    "guidance, mpgd": {"kind": "mpgd"},
    "tds": {},
    "das": {"tempering": "adaptive"},
}


def cost_of(family, chains):
    policy, chain = family
    return chains * STEPS * policy.evaluations_per_prediction(chain["guidance_scale"])


def test_the_lists_here_are_whole():
    named = {name.partition(",")[0] for name in (*BLACK_BOX, *GRADIENT)}
    assert named | {"best_of_n", "nrg"} == set(METHODS)  # the first is above, the other below


@pytest.mark.parametrize("method", BLACK_BOX)
def test_every_family_is_searched(family, method):
    policy, chain = family
    nfe = cost_of(family, chains=5)
    found = search_class(method)(policy, redness, **chain, **BLACK_BOX[method]).search(PROMPTS, nfe=nfe)
    for each in found:
        assert each.ledger.denoiser_evaluations <= nfe
        assert each.ledger.backward_passes == 0
        assert 3 <= len(each) <= each.ledger.reward_calls
        assert each.rewards.unique().numel() == len(each)
        assert each.best_image is not None


@pytest.mark.parametrize("method", GRADIENT)
def test_every_family_is_searched_by_gradients(family, method):
    policy, chain = family
    search = search_class(method.partition(",")[0])(policy, redness, **chain, **GRADIENT[method])
    nfe = cost_of(family, chains=2)
    for each in search.search(PROMPTS, nfe=nfe):
        assert each.ledger.denoiser_evaluations <= nfe
        assert (each.ledger.backward_passes > 0) == (method != "guidance, mpgd")
        assert each.rewards.unique().numel() == len(each) == 2
        assert each.best_image is not None


def test_rows_at_different_steps_are_those_of_each_alone(family):
    """Steps, prompts and guidance of every row in one batch; the last step of four is unguided."""
    policy, chain = family
    if chain["guidance_scale"] == 0 or policy.evaluations_per_prediction(3.0) == 1:
        chain = chain | {"guidance_interval": [0.0, 1.0]}
    else:
        chain = chain | {"guidance_interval": [0.0, 0.75]}
    space = PolicySpace(policy, redness, PROMPTS, ChainConfig(**chain))
    start = space.initial(torch.tensor([0, 1, 0, 1]), [(k,) for k in range(4)])
    rows = Rows(start.x, torch.tensor([0, 1, 2, 3]), start.prompts)
    together = space.predict(rows)
    alone = torch.cat([space.predict(rows[[i]]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-4)
    total = sum(ledger.denoiser_evaluations for ledger in space.ledgers)
    assert total == 2 * sum(space.evaluations)


def test_what_cannot_be_searched_is_refused():
    policy = Policy.wrap(tiny.tiny_sd())
    grouped = as_reward(redness)
    grouped.groupwise = True
    with pytest.raises(ValueError, match="'redness' compares the images of a batch"):
        BestOfN(policy, grouped).search("a dog", nfe=100)
    with pytest.raises(ValueError, match="no step from 0 to 1 is random"):
        TreeSearch(policy, redness, num_inference_steps=STEPS, eta=0.0, branch_levels=[0, 0.25]).search(
            "a dog", nfe=100
        )
    with pytest.raises(ValueError, match="no policy or no reward"):
        TreeSearch().search("a dog", nfe=100)


def flaky():
    """A reward that fails on every fourth image that it is given; those beside it are given again."""
    given = itertools.count()

    def reward(images, prompts, metadata):
        failed = torch.tensor([next(given) % 4 == 0 for _ in prompts])
        return redness(images, prompts, metadata).masked_fill(failed, torch.nan)

    return reward


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A flow, and the folder of a noise-aware reward of its denoiser."""
    policy = Policy.wrap(tiny.tiny_sd3())
    return policy, str(NoisyReward(policy, {"warmth": 1.0}, blocks=1, hidden=4).save(tmp_path_factory.mktemp("noisy")))


@pytest.mark.parametrize("method", METHODS)
def test_failed_scores_leave_a_smaller_set_and_a_count(noisy, method):
    policy, folder = noisy
    own = {"nrg": {"noisy_reward": folder}} | BLACK_BOX | GRADIENT
    chain = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "height": 16, "width": 16}
    search = search_class(method)(policy, flaky(), **chain, **own.get(method, {}))
    for each in search.search(PROMPTS, nfe=5 * STEPS):
        assert each.ledger.reward_failures > 0
        assert 0 < len(each) <= each.ledger.reward_calls - each.ledger.reward_failures
        assert each.rewards.isfinite().all()
        assert each.reward == each.rewards.max()
        assert torch.equal(redness(each.best_image[None] / 255, [], []).double(), each.rewards[[each.best]])
        if each.log_weights is not None:  # -inf: a sweep of the burn-in
            assert len(each.log_weights) == len(each)
            assert not each.log_weights.isnan().any()
            assert each.log_weights.isfinite().any()


def test_one_prompt_gives_one_result():
    found = TreeSearch(Policy.wrap(tiny.tiny_sd()), redness, num_inference_steps=STEPS).search("a dog", nfe=100)
    assert found.best_image.shape == (3, 16, 16)
    assert found.reward == pytest.approx(float(found.rewards.max()))
