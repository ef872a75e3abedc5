"""Methods of final samples on tiny real pipelines: their losses, gradients and weights, by formulas written out."""

import copy
import math

import pytest
import torch

from diffalign.data import Prompt
from diffalign.finetune import NFT, RAFT, RWR
from diffalign.finetune.nft import nft_loss
from diffalign.finetune.raft import best_of_group
from diffalign.laws import Level, Prediction
from diffalign.noise import normal, uniform
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux
from tests.finetune.tiny_training import draws_nan, gradient, perturb, redness

TEXTS = ["a red circle", "a blue cube"]
PROMPTS = [Prompt(text, 7 + i) for i, text in enumerate(TEXTS)]
COMMON = {"num_inference_steps": 4, "guidance_scale": 2.0, "num_prompts_per_step": 2, "group_size": 3}
METHODS = {
    "raft": (RAFT, {"top_k": 2, "timesteps_per_sample": 2}),
    "rwr": (RWR, {"temperature": 0.01}),
    "nft": (NFT, {"timesteps_per_sample": 4, "beta": 0.7, "max_advantage": 1.5}),
}
CLOCKS = {"seconds", "peak_memory_bytes", "samples_per_s"}


def trainer(name, make=tiny_sd, reward=redness, dtype=torch.float32, scheduler=None, **settings):
    method, own = METHODS[name]
    policy = Policy.wrap(make(dtype, **(scheduler or {})))
    policy.add_lora(rank=2, alpha=2)
    return method(policy, reward, **COMMON | own | settings)


def collected(t, prompts=PROMPTS):
    """The samples of a step, weighed."""
    part, _ = t.collect(prompts)
    t.weigh([part], prompts)
    return part


def minimised(t, part):
    t.optimizer.zero_grad()
    sums, ledger = t.minimise(part)
    return gradient(t), sums, ledger


def by_diffusers(pipe, x, timestep, embeds):
    """What the pipeline's own network predicts, without guidance."""
    if hasattr(pipe, "unet"):
        return pipe.unet(x, timestep.long(), encoder_hidden_states=embeds["prompt_embeds"]).sample
    told = {"encoder_hidden_states": embeds["prompt_embeds"], "pooled_projections": embeds["pooled_prompt_embeds"]}
    return pipe.transformer(hidden_states=x, timestep=timestep.float(), **told).sample


def addressed(t, part, draws):
    """Noise and shares of the levels (B, draws, ...) of all samples of a part, by their addresses."""
    rows = [(p.id, t.step, i % 3, part.passes) for i, p in enumerate(part.prompts)]
    where = {"seed": t.training.seed, "purpose": "forward", "rows": rows}
    shape = part.trajectory.latents.shape[1:]
    noise = torch.stack([normal(shape, step=k, dtype=torch.float64, **where) for k in range(draws)], 1)
    return noise, torch.stack([(k + uniform((), step=k, **where)) / draws for k in range(draws)], 1)


def noised_by_hand(t, x0, noise, u):
    """x_t, its timestep, the network's target and sigma, for one sample; `u` is the share of the training levels."""
    if t.policy.prediction_kind() == "velocity":
        return (1 - u) * x0 + u * noise, 1000 * u, noise - x0
    at = (1000 * u).long()
    scheduler = t.policy.pipe.scheduler
    x = scheduler.add_noise(x0, noise, at)
    v = t.policy.prediction_kind() == "v_prediction"
    return x, at, scheduler.get_velocity(x0, noise, at) if v else noise


@pytest.mark.parametrize(
    ("name", "make", "scheduler"),
    [("raft", tiny_sd, {}), ("rwr", tiny_sd, {"prediction_type": "v_prediction"}), ("raft", tiny_sd3, {})],
)
def test_loss_and_gradient_are_those_of_the_formula_in_float64(name, make, scheduler):
    """(1 / P) sum over prompts of the weighted mean error, and of the mean distance to the reference."""
    t = trainer(name, make, dtype=torch.float64, scheduler=scheduler, kl_weight=0.3)
    perturb(t.policy)
    t.step = 3
    part = collected(t)
    found, sums, ledger = minimised(t, part)
    draws = t.config.timesteps_per_sample
    noise, u = addressed(t, part, draws)
    rewards = part.rewards.reshape(2, 3)
    if name == "raft":
        weights = (rewards > rewards.amin(1, keepdim=True)).double() / 2
    else:
        weights = (rewards / 0.01).exp() / (rewards / 0.01).exp().sum(1, keepdim=True)
    weights = weights.flatten()
    trained = int((weights > 0).sum())
    errors, distances = torch.zeros(()), torch.zeros(())
    t.optimizer.zero_grad()
    for i, prompt in enumerate(part.prompts):
        embeds = t.policy.encode([prompt.text]).tensors
        for k in range(draws):
            x, at, target = noised_by_hand(t, part.trajectory.latents[i : i + 1], noise[i, k], u[i, k : k + 1])
            output = by_diffusers(t.policy.pipe, x, at, embeds)
            t.policy.denoiser.disable_adapters()
            with torch.no_grad():
                base = by_diffusers(t.policy.pipe, x, at, embeds)
            t.policy.denoiser.enable_adapters()
            errors = errors + weights[i] * (output - target).square().mean() / draws
            distances = distances + (weights[i] > 0) * (output - base).square().mean() / draws / (trained / 2)
    ((errors + 0.3 * distances) / 2).backward()
    # diffusers keeps its tables in float32, and timesteps are told in float32.
    torch.testing.assert_close(sums["loss"] / 6, (errors + 0.3 * distances).detach() / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums["prediction_mse"] / 6, distances.detach() / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, gradient(t), rtol=1e-4, atol=1e-6 * float(found.abs().max()))
    assert found.abs().max() > 0
    assert (ledger.denoiser_evaluations, ledger.backward_passes) == (2 * trained * draws, trained * draws)
    assert int(sums["trained"]) == trained


def test_the_best_of_a_group_share_its_weight():
    nan, inf = math.nan, math.inf
    rewards = torch.tensor(
        [[1.0, 3, 3, 2], [5, 5, 5, 5], [nan, -1, nan, -2], [nan, nan, nan, 7], [nan] * 4, [-inf, 0, 1, 2]]
    )
    expected = torch.tensor([[0, 2.0, 2, 0], [0] * 4, [0, 2, 0, 2], [0] * 4, [0] * 4, [0, 0, 2, 2]])
    assert torch.equal(best_of_group(rewards, 2), expected)
    assert torch.equal(best_of_group(rewards, 1)[0], torch.tensor([0, 4.0, 0, 0]))


def test_weights_of_a_regression():
    t = trainer("rwr", temperature=0.5)
    rewards = torch.tensor([[0.0, 1, 2], [math.nan, 400, 401], [math.nan] * 3], dtype=torch.float64)
    first, second = [1, math.e**2, math.e**4], [0, 1, math.e**2]
    expected = torch.tensor([[3 * w / sum(row) for w in row] for row in (first, second)], dtype=torch.float64)
    torch.testing.assert_close(t.weights(rewards)[:2], expected)
    assert not t.weights(rewards)[2].nan_to_num(0).any()
    plain = trainer("rwr", temperature=0.5, normalise="none", group_size=1)
    assert plain.weights(rewards[:1])[0].tolist() == pytest.approx(first, rel=1e-6)
    for beyond, highest in ((rewards, 401), (rewards.new_tensor([[45.0]]), 45), (rewards.new_tensor([[-60.0]]), -60)):
        with pytest.raises(
            ValueError, match=f"at temperature = 0.5 is beyond float32 where the highest reward is {highest}:"
        ):
            plain.weights(beyond)
    assert plain.weights(rewards[2:]).isnan().all()


def test_draws_are_spread_over_the_levels():
    """With as many draws as the sampler has steps each of its levels is drawn once; fewer are uniform on average."""
    prompts = [Prompt("a", i) for i in range(400)]
    for name, draws in (("nft", 4), ("raft", 2), ("rwr", 1)):
        levels = {"levels": "schedule"} if name == "nft" else {}
        t = trainer(name, tiny_sd3, timesteps_per_sample=draws, **levels)
        part = collected(t)
        part.prompts, rows = [prompts[i] for i in range(400)], torch.zeros(400, dtype=torch.long)
        t.training = t.training.model_copy(update={"group_size": 1})
        part.trajectory.latents = part.trajectory.latents[:1].expand(400, -1, -1, -1)
        part.condition = part.condition.rows(rows)
        times = [
            t.draw(part, torch.arange(400), torch.full((400,), k), torch.ones(400)).level.timestep for k in range(draws)
        ]
        if name == "nft":
            assert [at.unique().tolist() for at in times] == [[at] for at in t.schedule.timesteps.tolist()]
            continue
        for k, at in enumerate(times):
            assert k / draws <= at.min() / 1000 < (k + 0.05) / draws
            assert (k + 0.95) / draws < at.max() / 1000 < (k + 1) / draws
        assert torch.stack(times).mean() == pytest.approx(500, abs=4 * 289 / 400**0.5)


def test_passes_and_steps_have_draws_of_their_own():
    """2 passes over 2 of each prompt's samples, at 2 draws of each, in 2 steps; in a pass no more than 6 at once."""
    t = trainer("raft", tiny_sd3, num_inner_epochs=2)
    seen, draw = [], t.draw
    t.draw = lambda *a: seen.append(draw(*a)) or seen[-1]
    t.train(PROMPTS, steps=2)
    assert [len(each.noise) for each in seen] == [6, 2] * 4
    noises = [noise for each in seen for noise in each.noise]
    assert len({float(noise.sum()) for noise in noises}) == len(noises) == 32
    assert torch.equal(seen[0].latents, seen[2].latents)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_do_not_change_the_gradient(name):
    found = []
    for size in ("auto", 2):
        t = trainer(name, tiny_sd3, micro_batch_size=size, kl_weight=0.1)
        perturb(t.policy)
        found.append(minimised(t, collected(t)))
    (whole, sums, ledger), (parts, of_parts, in_parts) = found
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert float(sums["loss"]) == pytest.approx(float(of_parts["loss"]), rel=1e-5)
    assert ledger == in_parts


@pytest.mark.parametrize("name", METHODS)
def test_a_failed_score_has_no_part(name):
    """Its latent changes nothing; a group of failed scores trains nothing and costs nothing."""

    def failing(images, prompts, metadata):
        values = redness(images, prompts, metadata)
        values[0] = math.nan
        return torch.where(torch.tensor([p == TEXTS[1] for p in prompts]), math.nan, values)

    t = trainer(name, tiny_sd3, reward=failing)
    part = collected(t)
    found, sums, ledger = minimised(t, part)
    broken = trainer(name, tiny_sd3)
    draws_nan(broken, [0, 3, 4, 5])
    assert torch.equal(minimised(broken, collected(broken))[0], found)
    assert found.abs().max() > 0
    assert int(sums["trained"]) == ledger.backward_passes // t.config.timesteps_per_sample == 2
    row = t.train(PROMPTS, steps=1).rows[0]
    assert row["reward_failures"] == 4
    assert math.isfinite(row["reward"])
    part.advantages[:] = math.nan
    t.optimizer.zero_grad()
    assert t.minimise(part)[1].denoiser_evaluations == 0
    assert all(p.grad is None for p in t.parameters)


def test_the_worst_samples_of_nft_train():
    """Clipped to a probability of 0 they are all the negative policy's."""
    t = trainer("nft", tiny_sd3, max_advantage=0.01)
    part = collected(t)
    assert sorted({0.0, 1.0} | set(part.advantages.tolist())) == [0, 1]
    found, sums, _ = minimised(t, part)
    assert int(sums["trained"]) == 6
    part.advantages[part.advantages == 0] = math.nan
    assert not torch.equal(minimised(t, part)[0], found)


@pytest.mark.parametrize("name", METHODS)
def test_all_processes_make_the_same_calls_where_weights_are_divided(name, monkeypatch):
    """A divided network's call needs all processes: under FSDP samples without a part are evaluated, and have none."""

    t = trainer(name, tiny_sd3, kl_weight=0.1)
    draws_nan(t, slice(2))
    part = collected(t)
    assert part.rewards.isnan().tolist() == [True] * 2 + [False] * 4
    found, sums, _ = minimised(t, part)
    monkeypatch.setattr(type(t.policy), "blocks_are_sharded", True)
    again, of_all, ledger = minimised(t, part)
    torch.testing.assert_close(again, found, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    torch.testing.assert_close(of_all, sums, rtol=1e-5, atol=1e-6)
    assert ledger.backward_passes == 6 * t.config.timesteps_per_sample > int(sums["trained"])


def test_raft_leaves_a_group_without_spread():
    t = trainer("raft", reward=lambda images, prompts, metadata: torch.ones(len(images)))
    row = t.train(PROMPTS, steps=1).rows[0]
    assert row["trained"] == row["grad_norm"] == row["backward_passes"] == 0


def test_guidance_is_of_sampling_and_told_to_a_denoiser_that_reads_it():
    t, seen = trainer("rwr", tiny_sd3), []
    predict = t.policy.predict
    t.policy.predict = lambda *arguments: seen.append(arguments[3]) or predict(*arguments)
    part = collected(t)
    assert set(seen) == {2.0}
    seen.clear()
    minimised(t, part)
    assert set(seen) == {1.0}
    policy = Policy.wrap(tiny_flux())
    assert RWR(policy, redness, **COMMON, temperature=1.0).embedded_guidance == 2.0
    with pytest.raises(ValueError, match="trained at one scale for all levels"):
        RWR(policy, redness, **COMMON, temperature=1.0, guidance_interval=[0.2, 0.8])


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_of_memory_leaves_a_gradient_and_nothing_else(name):
    """As `footprint` asks for it: of groups of one, all rows at once."""
    t = trainer(name, tiny_sd3)
    t.training = t.training.model_copy(update={"group_size": 1, "micro_batch_size": "auto"})
    before = copy.deepcopy(t.state_dict())
    t.probe(PROMPTS)
    assert gradient(t).abs().max() > 0
    torch.testing.assert_close(t.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bit_equal(name):
    """With the old policy, which at the first step is not the policy's start."""
    settings = {"num_inner_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-2}
    settings |= {"old_decay_rate": 0.1, "timesteps_per_sample": 2} if name == "nft" else {}
    whole, first, second = (trainer(name, tiny_sd3, **settings) for _ in range(3))
    expected = whole.train(PROMPTS, steps=2).rows[-1]
    first.train(PROMPTS, steps=1)
    perturb(second.policy)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = second.train(PROMPTS, steps=1).rows[-1]
    assert {k: v for k, v in found.items() if k not in CLOCKS} == {k: v for k, v in expected.items() if k not in CLOCKS}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))
    if name == "nft":
        assert all(torch.equal(whole.old[key], second.old[key]) for key in whole.old)


def predictions(kind="velocity", seed=0):
    """(what the policy says, what the old one says, clean latents), of two rows with sigma 0.8 and 0.3."""
    generator = torch.Generator().manual_seed(seed)
    now, old, x, latents = torch.randn(4, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.8, 0.3], dtype=torch.float64)
    level = Level(1 - sigma if kind == "velocity" else (1 - sigma**2).sqrt(), sigma, 1000 * sigma)
    return Prediction(now.requires_grad_(), x, level, kind), Prediction(old, x, level, kind), latents


def test_nft_loss_is_that_of_the_paper():
    """Written out for a velocity; in each kind of prediction the same policies give the same loss."""
    now, old, latents = predictions()
    sigma, r, beta = now.level.sigma.reshape(2, 1, 1, 1), torch.tensor([0.9, 0.25], dtype=torch.float64), 0.4
    total = 0
    for share, v in (
        (r, (1 - beta) * old.output + beta * now.output),
        (1 - r, (1 + beta) * old.output - beta * now.output),
    ):
        error = now.x - sigma * v - latents
        size = error.abs().mean((1, 2, 3), keepdim=True).detach()
        total = total + share * (error**2 / size).mean((1, 2, 3))
    found = nft_loss(now, old, latents, r, beta)
    torch.testing.assert_close(found, total)
    other = [Prediction(p.x0, p.x, p.level, "sample") for p in (now, old)]
    torch.testing.assert_close(nft_loss(*other, latents, r, beta), total)
    exact = Prediction((now.x - latents) / sigma, now.x, now.level, "velocity")
    assert nft_loss(exact, exact, latents, r, beta).tolist() == pytest.approx([0, 0], abs=1e-15)


def test_at_the_old_policy_nft_is_weighted_flow_matching():
    """At v = v_old the gradient is (2 r - 1) 2 beta sigma^2 (v_old - u) / (D size): towards good, away from bad."""
    _, old, latents = predictions()
    r, beta = torch.tensor([0.9, 0.25], dtype=torch.float64), 0.4
    v = old.output.clone().requires_grad_()
    (found,) = torch.autograd.grad(
        nft_loss(Prediction(v, old.x, old.level, "velocity"), old, latents, r, beta).sum(), v
    )
    sigma = old.level.sigma.reshape(2, 1, 1, 1)
    u = (old.x - latents) / sigma  # x_t = x_0 + sigma u
    size = (sigma * (old.output - u)).abs().mean((1, 2, 3), keepdim=True)
    expected = (2 * r - 1).reshape(2, 1, 1, 1) * 2 * beta * sigma**2 * (old.output - u) / (36 * size)
    torch.testing.assert_close(found, expected)
    (found,) = torch.autograd.grad(
        nft_loss(Prediction(v, old.x, old.level, "velocity"), old, latents, torch.full((2,), 0.5), beta).sum(), v
    )
    assert found.abs().max() < 1e-15


def test_the_first_gradient_of_nft_is_by_advantages():
    """On a trainer: that of (2 r - 1) = A / max_advantage times the error of x_0, whatever beta is."""
    for beta in (0.2, 1.0):
        t = trainer("nft", tiny_sd3, dtype=torch.float64, beta=beta, kl_weight=0.0, max_advantage=4.0)
        part = collected(t)
        found, _, ledger = minimised(t, part)
        rewards = part.rewards.reshape(2, 3)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(unbiased=False)).flatten()
        spread = (rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt() / rewards.std(unbiased=False)
        assert float(advantages.abs().max()) < 4
        assert float(spread) < 1  # the mean is the prompt's, and the spread that of the step
        noise, _ = addressed(t, part, 4)
        t.optimizer.zero_grad()
        total = torch.zeros(())
        for i, prompt in enumerate(part.prompts):
            for k in range(4):
                at, x0 = t.schedule.timesteps[k : k + 1], part.trajectory.latents[i : i + 1]
                sigma = t.schedule.sigma[k]
                x = (1 - sigma) * x0 + sigma * noise[i, k]
                v = by_diffusers(t.policy.pipe, x, at, t.policy.encode([prompt.text]).tensors)
                error = x - sigma * v - x0
                total = total + advantages[i] * error.square().mean() / error.detach().abs().mean() / 4
        (total / 6).backward()
        torch.testing.assert_close(found, gradient(t), rtol=1e-4, atol=1e-6 * float(found.abs().max()))
        assert (ledger.denoiser_evaluations, ledger.backward_passes) == (48, 24)


def test_the_old_policy_samples_and_follows():
    t = trainer(
        "nft", tiny_sd3, old_decay=0.5, old_decay_rate=0.1, old_decay_start=1, num_inner_epochs=2, learning_rate=1e-2
    )
    assert [t.decay(i) for i in (0, 1, 3, 6, 60)] == pytest.approx([0, 0, 0.2, 0.5, 0.5])
    start = {name: p.detach().clone() for name, p in t.policy.trainable().items()}
    part, _ = t.collect(PROMPTS)
    perturb(t.policy)
    moved = {name: p.detach().clone() for name, p in t.policy.trainable().items()}
    assert torch.equal(t.collect(PROMPTS)[0].trajectory.latents, part.trajectory.latents)
    t.train(PROMPTS, steps=1)
    for name, p in t.policy.trainable().items():
        assert not torch.equal(p, moved[name])
        torch.testing.assert_close(t.old[name], 0.1 * start[name] + 0.9 * p.detach())
    assert not torch.equal(t.collect(PROMPTS)[0].trajectory.latents, part.trajectory.latents)


def test_the_old_policy_leaves_a_graph_and_the_weights_whole():
    """Under gradient checkpointing, which evaluates again in the backward pass."""
    found = []
    for checkpointing in ("none", "block"):
        t = trainer("nft", tiny_sd3, gradient_checkpointing=checkpointing)
        perturb(t.policy)
        kept = [p.detach().clone() for p in t.parameters]
        found.append(minimised(t, collected(t))[0])
        assert all(torch.equal(a, b) for a, b in zip(t.parameters, kept, strict=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6 * float(found[0].abs().max()))


def test_the_old_policy_is_another_under_autocast():
    """Which keeps the low-precision copies that it made of weights."""
    t = trainer("nft", tiny_sd3)
    perturb(t.policy)
    part = collected(t)
    draw = t.draw(part, torch.arange(6), torch.zeros(6, dtype=torch.long), part.advantages)
    with torch.autocast("cpu", torch.bfloat16):
        now = t.predict(draw).output
        with torch.no_grad(), t.old_policy():
            old = t.predict(draw).output
        again = t.predict(draw).output
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), t.old_policy():
        alone = t.predict(draw).output
    assert torch.equal(old, alone)
    assert torch.equal(now, again)
    assert not torch.equal(now, old)


@pytest.mark.verify
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["raft", "nft"])
def test_the_reward_rises_on_a_real_pipeline(name):
    """How light the images of `shapes-sd3` are, of the same noises before and after twelve steps."""
    policy = Policy.from_pretrained("zoo:shapes-sd3")
    policy.set_max_sequence_length(16)
    policy.add_lora(rank=4, alpha=4)
    method, _ = METHODS[name]
    t = method(
        policy, lambda images, prompts, metadata: images.mean((1, 2, 3)),
        num_inference_steps=4, guidance_scale=1.0, num_prompts_per_step=4, group_size=6, timesteps_per_sample=2,
        learning_rate=2e-3, adam_beta2=0.99,
    )  # fmt: skip
    texts = ["a red circle above a blue square", "a small green star", "a purple square above a yellow star", "a ring"]
    prompts = [Prompt(text, i) for i, text in enumerate(texts)]
    rewards = []
    for steps in (0, 12):
        trained, t.step = t.train(prompts, steps=steps)["reward"], 1000
        rewards.append(t.collect(prompts)[0].rewards)
        t.step = 0
    gain = rewards[1] - rewards[0]
    print(f"{name}: {trained}; {float(gain.mean()):.4f} +- {float(gain.std() / len(gain) ** 0.5):.4f}")
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    assert sum(trained[-3:]) > sum(trained[:3])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: trainer("raft", group_size=1), "group_size = 1, and raft compares"),
        (lambda: trainer("nft", group_size=1), "group_size = 1, and nft compares"),
        (lambda: trainer("rwr", group_size=1), "group_size = 1, and rwr compares"),
        (lambda: trainer("raft", top_k=3), "top_k = 3 of group_size = 3 leaves none out"),
        (lambda: trainer("nft", num_minibatches=3), "does not divide the 2 prompts"),
        (lambda: RWR(Policy.wrap(tiny_sd()), redness), "temperature"),
    ],
)
def test_wrong_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
