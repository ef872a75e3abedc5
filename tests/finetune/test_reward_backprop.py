"""Reward backpropagation against what must hold: the gradient of its own loss, and a reward that rises."""

import math

import pytest
import torch

from diffalign.data import Prompt
from diffalign.finetune import RewardBackprop
from diffalign.finetune.trainer import StepFailed
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rewards import Lagrangian, as_reward
from diffalign.rollout import differentiable_rollout
from tests.finetune.tiny_training import perturb, redness

PROMPTS = ["a red circle", "a blue cube", "a green star", "a red circle"]


def trainer(make=tiny_sd, reward=redness, **settings):
    torch.manual_seed(0)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "num_prompts_per_step": 4} | settings
    policy = Policy.wrap(make())
    policy.add_lora(rank=2, alpha=2)
    return RewardBackprop(policy, reward, **settings)


def gradient(make=tiny_sd, **settings):
    """The flat gradient of one step on PROMPTS, not clipped and not applied."""
    t = trainer(make, **settings)
    perturb(t.policy)
    sums, ledger = t.accumulate([Prompt(text, i, {}) for i, text in enumerate(PROMPTS)])
    return torch.cat([p.grad.flatten() for p in t.parameters]), sums, ledger


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "last_k", "k": 2},
        {"kind": "drtune", "k": 2},
        {"kind": "random_k", "high": 3},
        {"kind": "lv", "n": 1, "skip": 1},
    ],
)
def test_micro_batches_do_not_change_the_gradient(make, kind):
    whole, sums, ledger = gradient(make, gradient=kind)
    split, split_sums, split_ledger = gradient(make, gradient=kind, micro_batch_size=1)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-6 * float(whole.abs().max()) + 1e-9)
    torch.testing.assert_close(split_sums["loss"], sums["loss"], rtol=1e-5, atol=1e-6)
    assert split_ledger.as_dict() | {"seconds": 0, "peak_memory_bytes": 0} == ledger.as_dict() | {
        "seconds": 0,
        "peak_memory_bytes": 0,
    }


@pytest.mark.parametrize("checkpointing", ["step", "block"])
def test_gradient_checkpointing_does_not_change_the_gradient(checkpointing):
    plain, _, _ = gradient(gradient={"kind": "full"}, gradient_checkpointing="none")
    recomputed, _, _ = gradient(gradient={"kind": "full"}, gradient_checkpointing=checkpointing)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_the_reward_rises_on_the_training_prompts(make):
    history = trainer(make, learning_rate=3e-3, gradient={"kind": "last_k", "k": 2}).train(PROMPTS, steps=12)
    assert len(history) == 12
    assert sum(history["reward"][-3:]) / 3 > sum(history["reward"][:3]) / 3
    assert [row["step"] for row in history.rows] == list(range(1, 13))


def test_low_variance_averages_over_the_predictions_of_each_image():
    """Gradient and metrics are the mean over the n + 1 predictions; each of their images meets its own prompt."""
    asked: list[tuple[str, ...]] = []

    def wished(images, prompts, metadata):
        asked.append(tuple(prompts))
        sign = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts])
        return sign * redness(images, prompts, metadata)

    t = trainer(reward=wished, gradient={"kind": "lv", "n": 2, "skip": 1})
    perturb(t.policy)
    asked.clear()  # of the calls that only looked at the reward
    sums, ledger = t.accumulate([Prompt(text, i, {}) for i, text in enumerate(PROMPTS)])
    assert asked == [tuple(PROMPTS) * 3]
    assert (ledger.decodes, ledger.reward_calls) == (12, 12)
    assert (ledger.denoiser_evaluations, ledger.backward_passes) == (4 * 2 * (3 + 2), 4 * 2 * 3)

    plan = t.rule.plan(4, None)
    rows = [(i, 0, 0) for i in range(4)]
    trajectory = differentiable_rollout(
        t.policy, t.policy.encode(PROMPTS), t.law, t.schedule, rows=rows, seed=0, guidance_scale=2.0, plan=plan
    )
    rewards = [wished(t.policy.decode(x), PROMPTS, None) for x in trajectory.latents.split(4)]
    mean = torch.stack(rewards).mean()
    torch.testing.assert_close(sums["reward"] / 4, mean.detach())
    torch.testing.assert_close(sums["loss"] / 4, -mean.detach())
    expected = torch.autograd.grad(-mean, t.parameters)
    found = [p.grad for p in t.parameters]
    largest = max(float(g.abs().max()) for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 * largest)


def test_a_failed_prediction_of_low_variance_is_one_of_many():
    broken = []

    def sometimes(images, prompts, metadata):
        value = redness(images, prompts, metadata)
        broken.append(value[5].detach()) if not broken else None  # by its content: the others are scored again
        return torch.where(value == broken[0], torch.nan, value)

    _, sums, ledger = gradient(reward=sometimes, gradient={"kind": "lv", "n": 2})
    assert ledger.reward_failures == 1
    torch.testing.assert_close(sums["reward_valid"], torch.tensor(11 / 3))


@pytest.mark.parametrize(("make", "kind"), [(tiny_sd, {"kind": "lv", "n": 1}), (tiny_sd3, {"kind": "sparse", "k": 2})])
def test_a_step_of_the_newer_rules_moves_the_weights(make, kind):
    t = trainer(make, gradient=kind, kl_weight=0.1)
    perturb(t.policy)
    before = [p.clone() for p in t.parameters]
    row = t.train(PROMPTS, steps=1).rows[0]
    assert all(math.isfinite(row[name]) for name in ("loss", "reward", "prediction_mse"))
    assert row["grad_norm"] > 0
    assert row["prediction_mse"] > 0
    assert not any(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"kind": "sparse", "k": 5}, "gradient asks for 5 steps with gradient but num_inference_steps is 4; lower it"),
        ({"kind": "sparse", "late_bias": -1}, "greater than or equal to 0"),
        ({"kind": "lv", "n": 0}, "greater than 0"),
        ({"kind": "lv", "skip": 4}, "gradient.skip = 4 leaves no step of num_inference_steps = 4; use 0, or 1 with"),
    ],
)
def test_rules_that_do_not_fit_are_refused_in_words(kind, words):
    with pytest.raises(ValueError, match=words):
        trainer(gradient=kind)


def test_hinge_stops_pushing_past_its_target():
    """With the target below every reward the hinge is flat: zero loss, zero gradient, unmoved weights (no decay)."""
    t = trainer(loss="hinge", target=-10.0, adam_weight_decay=0.0)
    before = [p.clone() for p in t.parameters]
    history = t.train(PROMPTS, steps=2)
    assert history["loss"] == [0.0, 0.0]
    assert history["grad_norm"] == [0.0, 0.0]
    assert all(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True))


def test_target_loss_is_the_distance_to_the_target():
    t = trainer(loss="target", target=0.5)
    torch.testing.assert_close(t.loss(torch.tensor([0.2, 0.9])), torch.tensor([0.3, 0.4]))


def test_distance_to_the_reference_starts_at_zero_and_is_felt():
    """The adapter starts as the identity: distance 0. A heavy weight keeps the policy nearer than none."""
    free = trainer(learning_rate=3e-3, kl_weight=0.0, gradient={"kind": "last_k", "k": 1})
    held = trainer(learning_rate=3e-3, kl_weight=100.0, gradient={"kind": "last_k", "k": 1})
    held_history = held.train(PROMPTS, steps=8)
    free.train(PROMPTS, steps=8)
    assert held_history["prediction_mse"][0] == 0.0
    weight = [
        sum(float(p.detach().square().sum()) for n, p in t.policy.trainable().items() if "lora_B" in n)
        for t in (free, held)
    ]
    assert weight[1] < weight[0]


def test_failed_scores_leave_the_gradient_and_are_counted():
    def sometimes(images, prompts, metadata):
        value = redness(images, prompts, metadata)
        return torch.where(torch.tensor([p == "a green star" for p in prompts]), torch.nan, value)

    sound, _, _ = gradient()
    holed, sums, ledger = gradient(reward=sometimes)
    assert torch.isfinite(holed).all()
    assert not torch.equal(holed, sound)
    assert ledger.reward_failures == 1
    assert float(sums["reward_valid"]) == 3


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights():
    def steep(images, prompts, metadata):
        # Finite at the images, of infinite slope.
        return (images.mean((1, 2, 3)) - images.detach().mean((1, 2, 3))).abs().sqrt()

    t = trainer(reward=steep)
    before = [p.clone() for p in t.parameters]
    with pytest.raises(StepFailed, match="step 1: the gradient is not finite"):
        t.train(PROMPTS, steps=1)
    assert all(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True))


def test_a_step_in_which_every_score_failed_stops_the_run_and_leaves_the_weights():
    t = trainer(reward=lambda images, prompts, metadata: images.mean((1, 2, 3)) * torch.inf)
    before = [p.clone() for p in t.parameters]
    with pytest.raises(StepFailed, match="every score of '<lambda>' failed"):
        t.train(PROMPTS, steps=1)
    assert all(torch.equal(p, q) for p, q in zip(t.parameters, before, strict=True))


def test_a_reward_without_gradient_is_refused_in_words():
    black_box = as_reward(lambda images, prompts, metadata: images.detach().mean((1, 2, 3)), differentiable=False)
    with pytest.raises(ValueError, match="not differentiable"):
        trainer(reward=black_box)


def test_a_reward_of_groups_is_refused_in_words():
    compared = as_reward(lambda images, prompts, metadata: images.mean((1, 2, 3)) - images.mean())
    compared.groupwise = True
    with pytest.raises(ValueError, match="compares the images of a prompt"):
        trainer(reward=compared)


def test_resumed_training_equals_uninterrupted_training():
    settings = {"learning_rate": 3e-3, "gradient": {"kind": "random_k", "high": 3}, "eta": 1.0}
    whole = trainer(**settings)
    rows = whole.train(PROMPTS, steps=4).rows
    first = trainer(**settings)
    first.train(PROMPTS, steps=2)
    state = first.state_dict()
    second = trainer(**settings)
    perturb(second.policy)
    second.load_state_dict(state)
    resumed = second.train(PROMPTS, steps=2).rows
    for p, q in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(p, q)
    clocks = {"seconds", "samples_per_s", "peak_memory_bytes"}
    for ours, theirs in zip(resumed, rows[2:], strict=True):
        assert {k: v for k, v in ours.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }


def test_a_reward_that_adapts_is_told_its_means_and_resumed():
    def build():
        red = as_reward(lambda images, prompts, metadata: images[:, 0].mean((1, 2)), name="red")
        blue = as_reward(lambda images, prompts, metadata: images[:, 2].mean((1, 2)), name="blue")
        return Lagrangian(red, [(blue, 0.9)], rate=0.5, name="bounded")

    whole = trainer(reward=1.0 * build())
    rows = whole.train(PROMPTS, steps=3).rows
    multiplier = 0.0
    for row in rows:
        multiplier = max(0.0, multiplier - 0.5 * (row["reward/blue"] - 0.9))
    assert multiplier > 0
    (bounded,) = (reward for reward in whole.reward.walk() if isinstance(reward, Lagrangian))
    assert bounded.multipliers["blue"] == pytest.approx(multiplier)
    assert rows[1]["reward/bounded"] != pytest.approx(rows[1]["reward/red"])

    first = trainer(reward=1.0 * build())
    first.train(PROMPTS, steps=2)
    second = trainer(reward=1.0 * build())
    second.load_state_dict(first.state_dict())
    resumed = second.train(PROMPTS, steps=1).rows
    assert resumed[0]["reward"] == rows[2]["reward"]
    assert all(torch.equal(p, q) for p, q in zip(second.parameters, whole.parameters, strict=True))


def test_learning_rate_schedule_is_followed():
    t = trainer(lr_scheduler="linear", max_train_steps=4, learning_rate=1e-3)
    assert t.train(PROMPTS)["learning_rate"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert math.isclose(t.lr_scheduler.get_last_lr()[0], 0.0, abs_tol=1e-12)
