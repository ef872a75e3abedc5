"""Learning a noise-aware reward: its loss by hand, what it must find, and a run that goes on to the bit."""

import itertools
import math

import pytest
import torch

from diffalign.data import Prompt
from diffalign.engine.checkpoint import load_checkpoint, save_checkpoint
from diffalign.finetune.noisy_reward import NoisyRewardTrainer
from diffalign.finetune.trainer import StepFailed
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rewards.noisy import Choices, NoisyReward, accuracies

WORDS = ["a b", "c", "d e f", "g h"]


def brightness(latents):
    """A value that a blind reader of tokens can learn: the mean of the first channel."""
    return latents[:, :, :1].mean((2, 3, 4))[..., None]


def choices(policy, prompts=24, group=3, seed=0):
    latents = torch.randn(prompts, group, *policy.latent_shape(), generator=torch.Generator().manual_seed(seed))
    ways = torch.arange(prompts)[:, None] + torch.arange(group)  # the brightest is not always at one place
    latents[:, :, 0] += torch.linspace(-0.5, 0.5, group)[ways % group][..., None, None]
    texts = list(itertools.islice(itertools.cycle(WORDS), prompts))
    return Choices.from_values(latents, brightness(latents), texts, torch.tensor([0.05]))


def trainer(make=tiny_sd3, choose=choices, **settings):
    policy = Policy.wrap(make())
    reward = NoisyReward(policy, {"bright": 1.0}, blocks=1, hidden=16)
    return NoisyRewardTrainer(reward, choose(policy), **({"num_prompts_per_step": 8, "learning_rate": 1e-2} | settings))


def test_the_loss_is_bradley_terry_with_ties_over_the_pairs_of_a_prompt():
    t = trainer(num_prompts_per_step=2)
    outcome = torch.tensor([[1.0, 0.0, torch.nan], [-1.0, -1.0, 1.0]])[..., None]
    t.choices = Choices(t.choices.latents[:2], outcome, t.choices.prompts[:2])
    sums, ledger = t.accumulate(t.prompts[:2])

    level, noise = t.level([0, 1]), t.noise([0, 1])
    nats = [[], []]
    for p in range(2):
        rewards = []
        for g in range(3):
            x = level.alpha[p] * t.choices.latents[p, g] + level.sigma[p] * noise[p]
            with torch.no_grad():
                given = x[None].float(), level.rows(slice(p, p + 1)), t.policy.encode([t.choices.prompts[p]])
                rewards.append(float(t.learner(*given)))
        for pair, (i, j) in enumerate(itertools.combinations(range(3), 2)):
            first, second = (1 / (1 + 2 * math.exp(-d)) for d in (rewards[i] - rewards[j], rewards[j] - rewards[i]))
            told = float(outcome[p, pair, 0])
            if not math.isnan(told):  # theta is 2 at the start
                nats[p].append(-math.log(first if told > 0 else second if told < 0 else 1 - first - second))
    expected = sum(sum(of_prompt) / len(of_prompt) for of_prompt in nats)
    assert float(sums["loss"]) == pytest.approx(3 * expected, rel=1e-5)  # the trainer divides by images
    assert ledger.denoiser_evaluations == 6


def test_levels_are_the_schedules_own_and_noise_is_that_of_step_and_prompt():
    t = trainer()
    t.step = 3
    level = t.level(range(24))
    assert torch.isin(level.sigma, t.schedule.sigma).all()
    assert len(level.sigma.unique()) > 12
    assert not torch.equal(t.noise([0]), t.noise([1]))
    assert torch.equal(t.noise([0, 1])[1:], t.noise([1]))
    t.step = 4
    assert not torch.equal(level.sigma, t.level(range(24)).sigma)
    clean = trainer(levels="clean").level([0, 1])
    assert clean.sigma.tolist() == [0, 0]
    assert clean.timestep.tolist() == [0, 0]


@pytest.mark.parametrize("make", [tiny_sd3, tiny_sd])
def test_it_learns_what_the_choices_follow(make):
    t = trainer(make, max_train_steps=60)
    base = {name: p.clone() for name, p in t.policy.denoiser.named_parameters()}
    held = choices(t.policy, seed=1)
    before = accuracies(t.learner, held)["bright"]["0"]
    history = t.train(t.prompts)
    after = accuracies(t.learner, held)["bright"]["0"]
    assert after > max(0.8, before)
    assert sum(history["loss"][-10:]) < sum(history["loss"][:10])
    assert all(torch.equal(p, base[name]) for name, p in t.policy.denoiser.named_parameters())
    assert t.policy.adapter_name is None


def test_a_run_goes_on_to_the_bit(tmp_path):
    whole = trainer()
    rows = whole.train(whole.prompts, steps=4).rows
    half = trainer()
    half.train(half.prompts, steps=2)
    save_checkpoint(tmp_path, 2, half.state_dict())
    resumed = trainer()
    step, tree = load_checkpoint(tmp_path)
    resumed.load_state_dict(tree)
    assert step == resumed.step == 2
    again = resumed.train(resumed.prompts, steps=2).rows
    for name, tensor in whole.learner.heads.state_dict().items():
        assert torch.equal(tensor, resumed.learner.heads.state_dict()[name]), name
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[2:]]


def test_heads_of_another_recipe_and_other_choices_are_refused():
    t = trainer()
    state = t.state_dict() | {"heads": {}}
    with pytest.raises(ValueError, match="heads and this recipe's differ"):
        t.load_state_dict(state)
    reward = NoisyReward(t.policy, {"a": 1.0, "b": 1.0}, blocks=1)
    with pytest.raises(ValueError, match="choices by 1 objectives for a reward of 2, a, b"):
        NoisyRewardTrainer(reward, t.choices)
    with pytest.raises(ValueError, match="sft holds a policy near its base, and noisy_reward trains none: leave it"):
        trainer(sft={"images": "list.jsonl", "weight": 1.0})


def test_a_step_without_a_finite_gradient_is_not_taken():
    t = trainer(num_prompts_per_step=1)
    t.choices.latents[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in t.learner.heads.state_dict().items()}
    with pytest.raises(StepFailed, match="the gradient is not finite"):
        t.take_step([Prompt("a", 0)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.learner.heads.state_dict().items())
