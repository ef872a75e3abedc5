"""DRAGON: its sets against brute force, its losses against closed forms and diffusers' own parts, and resuming."""

import copy
import math

import pytest
import torch
from torch import nn

from diffalign.data import Prompt
from diffalign.finetune import DDPO, PRDP, RAFT, Dragon, FlowGRPO
from diffalign.finetune.dragon import dpo_loss, halves, kto_loss, pairs_of, swapped
from diffalign.finetune.trainer import StepFailed
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rewards import SetCredit, as_reward
from diffalign.rewards.sets import FrechetReward, SetReward, VendiReward
from tests.finetune.tiny_training import draws_nan, gradient, perturb, redness

PROMPTS = ["a red circle", "a blue cube"]
COMMON = {"num_inference_steps": 3, "guidance_scale": 2.0, "num_prompts_per_step": 2, "group_size": 4, "beta": 20.0}


def colours(images):
    means = images.mean(dim=(2, 3))
    return torch.cat([means, means.square(), images.std(dim=(2, 3))], dim=1)


def exemplars(count=12):
    return torch.rand(count, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def trainer(make=tiny_sd, reward=redness, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    policy = Policy.wrap(make(dtype))
    policy.add_lora(rank=2, alpha=2)
    return Dragon(policy, reward, **COMMON | settings)


def collected(t):
    """A part of the trainer's prompts whose samples are divided."""
    prompts = [Prompt(text, i) for i, text in enumerate(PROMPTS)]
    part, _ = t.collect(prompts)
    t.weigh([part], prompts)
    return part


def minimised(t, part):
    for p in t.parameters:
        p.grad = None
    return t.minimise(part)[0]


def test_losses_in_closed_form():
    h = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.1, 0.5, -0.4], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(dpo_loss(h, g), -torch.log(1 / (1 + torch.exp(-(h - g)))), rtol=1e-14)
    expected = [1 - 1 / (1 + math.exp(-s * (x - 0.2))) for s, x in zip(labels.tolist(), h.tolist(), strict=True)]
    assert torch.allclose(kto_loss(h, labels, 0.2), torch.tensor(expected, dtype=torch.float64), rtol=1e-14)
    assert torch.autograd.gradcheck(dpo_loss, (h, g))
    assert torch.autograd.gradcheck(lambda h: kto_loss(h, labels, 0.2), (h,))
    zero = torch.zeros(1)
    assert dpo_loss(zero, zero) == pytest.approx(math.log(2))
    assert kto_loss(zero, zero + 1, 0.0) == 0.5
    # What is good should rise and what is bad should fall.
    assert (torch.autograd.grad(kto_loss(h, labels, 0.2).sum(), h)[0].sign() == -labels).all()


def test_the_better_half_of_a_group_against_the_worse():
    nan = math.nan
    rewards = torch.tensor(
        [
            [3.0, 1.0, 2.0, 0.0],
            [1.0, 1.0, 1.0, 0.0],  # of four (1, 1) are no pair, and (1, 0) are
            [5.0, 5.0, 5.0, 5.0],
            [nan, 2.0, 0.0, 1.0],  # an odd number: the middle one is left out
            [nan, 2.0, nan, nan],
        ]
    )
    labels = halves(rewards)
    assert labels.tolist() == [[1, -1, 2, -2], [0, 2, 0, -2], [0, 0, 0, 0], [0, 1, -1, 0], [0, 0, 0, 0]]
    tied = torch.tensor([[2.0, 1.0, 1.0, 0.0]])  # (2, 1) and (1, 0) are pairs, and not (1, 1) with (2, 0)
    for given, found in ((rewards, labels), (tied, halves(tied))):
        good, bad = pairs_of(found.flatten(), 4).T
        kept = found.flatten()[good] > 0
        good, bad = good[kept], bad[kept]
        assert len(good) == (found > 0).sum()
        assert (found.flatten()[good] == -found.flatten()[bad]).all()
        assert (given.flatten()[good] > given.flatten()[bad]).all()


def test_pairs_are_of_one_prompt_and_leave_out_what_has_no_label():
    labels = torch.tensor([1, -2, 2, -1, 0, 1, -1, 0, 0, 0, 0, 0], dtype=torch.float64)
    pairs = pairs_of(labels, 4)
    assert pairs.shape == (6, 2)
    assert sorted(pairs.flatten().tolist()) == list(range(12))
    assert (pairs[:, 0] // 4 == pairs[:, 1] // 4).all()
    assert sorted(labels[pairs].tolist()) == [[0, 0]] * 3 + [[1, -1]] * 2 + [[2, -2]]


@pytest.mark.parametrize("reward", [FrechetReward(exemplars()), VendiReward()], ids=["frechet", "vendi"])
def test_swaps_make_the_set_that_brute_force_makes(reward):
    features = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[1, 3, 2] = math.nan
    labels, values = swapped(reward, features)
    assert labels[1].tolist()[1::2] == [0, 0]  # the failed sample and the one in its place of the other half
    places = [(p, i) for p in range(3) for i in range(2) if (p, i) != (1, 1)]
    first, second = (torch.stack([features[p, i + 2 * side] for p, i in places]) for side in (0, 1))
    best, other = (first, second) if reward.value(first) >= reward.value(second) else (second, first)
    start = float(reward.value(best))
    for i in range(len(best)):
        tried = torch.cat([best[:i], other[i : i + 1], best[i + 1 :]])
        if reward.value(tried) > reward.value(best):
            best, other = tried, torch.cat([other[:i], best[i : i + 1], other[i + 1 :]])
    good = torch.stack([features[p, i if labels[p, i] > 0 else i + 2] for p, i in places])
    assert torch.equal(good, best)
    assert all(labels[p, i] == -labels[p, i + 2] and abs(labels[p, i]) == i + 1 for p, i in places)
    assert values["set_chosen"] == pytest.approx(float(reward.value(best)), rel=1e-12)
    assert values["set_rejected"] == pytest.approx(float(reward.value(other)), rel=1e-12)
    assert values["set_chosen"] >= start
    labels, values = swapped(reward, torch.full((2, 2, 9), math.nan, dtype=torch.float64))
    assert not labels.any()
    assert not values


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
@pytest.mark.parametrize(("settings", "start"), [({}, math.log(2)), ({"contrast": "kto"}, 0.5)], ids=["dpo", "kto"])
def test_the_first_loss_is_known_and_the_first_update_goes_towards_the_good_set(make, settings, start):
    for size in ("auto", 2):
        t = trainer(make, micro_batch_size=size, timesteps_per_sample=2, **settings)
        row = t.train(PROMPTS, steps=1).rows[0]
        assert row["loss"] == pytest.approx(start, rel=1e-6)
        assert row["implicit_chosen"] == row["implicit_rejected"] == row["prediction_mse"] == 0
        assert row["trained"] == 1
        assert row["grad_norm"] > 0
    t = trainer(make, learning_rate=1e-4, adam_beta1=0.0, **settings)
    part = collected(t)
    minimised(t, part)
    t.optimizer.step()
    after = minimised(t, part)
    assert after["implicit_chosen"] > after["implicit_rejected"]
    assert after["loss"] < start * t.images


@pytest.mark.parametrize("contrast", ["dpo", "kto"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_loss_and_gradient_are_those_of_the_formula_in_float64(make, contrast):
    """On diffusers' own network and scheduler; with the noise and levels that the trainer drew."""
    t = trainer(make, dtype=torch.float64, contrast=contrast)
    perturb(t.policy)
    part = collected(t)
    (draw,) = t.draws(part)
    for _ in range(20):  # until the policy fits these samples better than the reference, so that z is above 0
        gains = torch.autograd.grad(t.implicit(draw)[0].mean(), t.parameters)
        with torch.no_grad():
            for p, gain in zip(t.parameters, gains, strict=True):
                p.add_(0.02 * gain)
    found = minimised(t, part)
    ours = gradient(t)
    good, bad = draw.weight > 0, draw.weight < 0
    assert torch.equal(draw.noise[good], draw.noise[bad])
    assert torch.equal(draw.level.timestep[good], draw.level.timestep[bad])
    pipe, embeds, x0, noise = t.policy.pipe, draw.condition.tensors, draw.latents, draw.noise
    if make is tiny_sd3:
        sigma = (draw.level.timestep / 1000).view(-1, 1, 1, 1)
        x, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        told = {"encoder_hidden_states": embeds["prompt_embeds"], "pooled_projections": embeds["pooled_prompt_embeds"]}
        predict = lambda: pipe.transformer(hidden_states=x, timestep=draw.level.timestep, **told).sample  # noqa: E731
    else:
        time = draw.level.timestep.long()
        x, target = pipe.scheduler.add_noise(x0, noise, time), noise
        predict = lambda: pipe.unet(x, time, encoder_hidden_states=embeds["prompt_embeds"]).sample  # noqa: E731
    error = nn.functional.mse_loss(predict(), target, reduction="none").mean((1, 2, 3))
    t.policy.denoiser.disable_adapters()
    with torch.no_grad():
        base = nn.functional.mse_loss(predict(), target, reduction="none").mean((1, 2, 3))
    t.policy.denoiser.enable_adapters()
    h = 10 * (base - error)
    if contrast == "dpo":
        loss = -(h[good] - h[bad]).sigmoid().log().mean()
    else:
        point = h.mean().detach().clamp(min=0)
        loss = torch.where(good, 1 - (h - point).sigmoid(), 1 - (point - h).sigmoid()).mean()
        assert point > 0
    for p in t.parameters:
        p.grad = None
    loss.backward()
    assert float(found["loss"]) / t.images == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(ours, gradient(t), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"contrast": "kto"}, {"contrast": "kto", "paired": False}], ids=str)
def test_micro_batches_do_not_change_the_gradient(settings):
    """Nor the reference point of KTO, which is of the whole update."""
    found = []
    for size in ("auto", 3):
        t = trainer(dtype=torch.float64, micro_batch_size=size, timesteps_per_sample=2, kl_weight=0.1, **settings)
        perturb(t.policy)
        part = collected(t)
        sums = minimised(t, part)
        found.append((torch.stack([torch.as_tensor(v).double() for v in sums.values()]), gradient(t)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_unpaired_the_better_half_of_the_step_is_good_whatever_its_prompt():
    by_prompt = as_reward(lambda images, prompts, metadata: torch.tensor([float(p == PROMPTS[1]) for p in prompts]))
    t = trainer(reward=by_prompt, contrast="kto", paired=False)
    part = collected(t)
    assert part.advantages.sign().tolist() == [-1.0] * 4 + [1.0] * 4
    (draw,) = t.draws(part)
    assert len(draw.noise.flatten(1).unique(dim=0)) == 8  # each has its own
    paired = trainer(reward=by_prompt)
    assert not collected(paired).advantages.any()  # within a prompt all are equal


def test_unpaired_minibatches_count_each_sample_the_same_whichever_set_they_have_more_of():
    """All good ones in one, all bad ones in the other: their mean gradient is that of both at once."""
    by_prompt = as_reward(lambda images, prompts, metadata: torch.tensor([float(p == PROMPTS[1]) for p in prompts]))
    prompts = [Prompt(text, i) for i, text in enumerate(PROMPTS)]
    found = []
    how = {"contrast": "kto", "paired": False, "dtype": torch.float64, "micro_batch_size": 4}
    for parts in (1, 2):
        t = trainer(reward=by_prompt, num_minibatches=parts, **how)
        collected_parts = [t.collect(prompts[i::parts])[0] for i in range(parts)]
        t.weigh(collected_parts, prompts)
        sums = [t.minimise(part)[0] for part in collected_parts]
        assert [float(each["loss"]) / t.images for each in sums] == [pytest.approx(0.5)] * parts
        found.append(gradient(t) / parts)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("credit", ["swap", "leave_one_out"])
def test_a_set_reward_divides_the_step_and_its_value_is_the_reward(credit):
    reward = FrechetReward(exemplars(), colours)
    t = trainer(reward=SetCredit(reward), credit=credit)
    part = collected(t)
    features = part.features["frechet"].double()
    assert float(part.rewards.mean()) == pytest.approx(float(reward.value(features)), rel=1e-5)
    labels = part.advantages.reshape(2, 4)
    assert labels.ne(0).all()
    if credit == "swap":
        expected, values = swapped(reward, features.reshape(2, 4, 9))
        assert torch.equal(labels, expected)
        row = t.train(PROMPTS, steps=1).rows[0]
        assert row["set_chosen"] == pytest.approx(values["set_chosen"], rel=1e-5)
        assert row["set_chosen"] > row["set_rejected"]
        assert row["reward"] == pytest.approx(float(reward.value(features)), rel=1e-5)
    else:
        assert torch.equal(labels, halves(reward.credit(features).reshape(2, 4)))


def test_a_failed_score_leaves_both_sets():
    class Fragile(SetReward):
        name = "fragile"

        def value(self, features):
            return features[:, 0].mean()

    def blind(images):
        features = colours(images)
        features[1] = math.nan
        return features

    t = trainer(reward=SetCredit(Fragile(blind)))
    row = t.train(PROMPTS, steps=1).rows[0]
    assert row["reward_failures"] == 1
    assert row["trained"] == 6 / 8
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_minibatch_whose_features_all_failed_trains_nothing():
    calls = []

    def sometimes(images):
        calls.append(1)
        if len(calls) <= 5:  # the first batch, and each of its images alone
            raise RuntimeError("out of memory")
        return colours(images)

    t = trainer(reward=SetCredit(VendiReward(sometimes)), num_minibatches=2)
    row = t.train(PROMPTS, steps=1).rows[0]
    assert (row["reward_failures"], row["trained"]) == (4, 0.5)


def test_a_sample_that_is_only_evaluated_has_no_nan():
    """With FSDP pairs of failed samples are evaluated too, at weight 0."""
    t = trainer()
    draws_nan(t, 0)
    part = collected(t)
    assert part.advantages[0] == 0
    rows = torch.tensor([[0, 1]])
    draw = t._together(part, rows, torch.tensor([0]), part.advantages.sign())
    assert draw.x.isfinite().all()
    assert draw.weight[0] == 0


def test_a_step_without_any_score_leaves_the_weights():
    def broken(images):
        raise RuntimeError("no encoder today")

    t = trainer(reward=SetCredit(VendiReward(broken)))
    before = copy.deepcopy(t.policy.trainable())
    with pytest.raises(StepFailed, match="every score of 'vendi' failed"):
        t.train(PROMPTS, steps=1)
    assert all(torch.equal(p, before[name]) for name, p in t.policy.trainable().items())


@pytest.mark.parametrize(
    ("method", "make", "settings"),
    [
        (DDPO, tiny_sd, {"advantage": "batch"}),
        (FlowGRPO, tiny_sd3, {}),
        (PRDP, tiny_sd, {"beta": 0.1, "clip_range": 1e-3}),
        (RAFT, tiny_sd3, {"top_k": 2}),
    ],
)
def test_any_method_that_learns_from_scores_trains_on_what_an_image_does_for_the_set(method, make, settings):
    policy = Policy.wrap(make())
    policy.add_lora(rank=2, alpha=2)
    reward = FrechetReward(exemplars(), colours)
    common = {key: value for key, value in COMMON.items() if key != "beta"}
    t = method(policy, SetCredit(reward), **common | settings)
    part, _ = t.collect([Prompt(text, i) for i, text in enumerate(PROMPTS)])
    features = part.features["frechet"].double()
    value, credit = reward.value(features), reward.credit(features)
    torch.testing.assert_close(part.rewards, value + 7 * (credit - credit.mean()), rtol=1e-5, atol=1e-6)
    row = t.train(PROMPTS, steps=1).rows[0]
    assert row["reward"] == pytest.approx(float(value), rel=1e-5)
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("settings", [{}, {"contrast": "kto", "credit": "leave_one_out"}], ids=str)
def test_a_resumed_run_is_bit_equal(settings):
    reward = SetCredit(VendiReward(colours))
    settings = settings | {"num_inner_epochs": 2, "num_minibatches": 2, "num_prompts_per_step": 4}
    prompts = [*PROMPTS, "a", "b"]
    whole = trainer(reward=reward, **settings)
    whole.train(prompts, steps=1)
    kept = copy.deepcopy(whole.state_dict())
    rows = whole.train(prompts, steps=1).rows
    again = trainer(reward=reward, **settings)
    again.load_state_dict(kept)
    resumed = again.train(prompts, steps=1).rows
    timed = ("seconds", "samples_per_s", "peak_memory_bytes")
    assert [{k: v for k, v in r.items() if k not in timed} for r in rows] == [
        {k: v for k, v in r.items() if k not in timed} for r in resumed
    ]
    for name, p in whole.policy.trainable().items():
        assert torch.equal(p, again.policy.trainable()[name]), name


def test_a_probe_of_memory_leaves_a_gradient_and_nothing_else():
    t = trainer(reward=SetCredit(VendiReward(colours)))
    t.training = t.training.model_copy(update={"group_size": 1, "micro_batch_size": "auto"})
    before = copy.deepcopy(t.state_dict())
    t.probe([Prompt(text, i) for i, text in enumerate(PROMPTS)])
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in t.parameters)
    torch.testing.assert_close(t.state_dict(), before, rtol=0, atol=0)


def test_what_cannot_be_trained_is_said_at_once():
    of_sets = SetCredit(VendiReward(colours))
    cases = (
        ({"group_size": 3}, "group_size = 3: dragon divides"),
        ({"group_size": 1}, "compares the samples of a prompt"),
        ({"paired": False}, "paired = false is for contrast = kto"),
        ({"reward": of_sets + as_reward(redness)}, "is for a reward of sets alone"),
        ({"reward": of_sets, "contrast": "kto", "paired": False}, "with paired = false use leave_one_out"),
    )
    for settings, words in cases:
        with pytest.raises(ValueError, match=words):
            trainer(**settings)
    mixed = trainer(reward=of_sets + as_reward(redness), credit="leave_one_out")
    assert mixed.train(PROMPTS, steps=1).rows[0]["trained"] == 1
