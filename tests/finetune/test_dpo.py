"""DPO against its formula written on diffusers' own parts, a problem whose fixed point is known, and ln 2."""

import math
from contextlib import contextmanager
from io import BytesIO

import pytest
import torch
from PIL import Image
from torch import nn

from diffalign.data import Pair, Prompt
from diffalign.finetune import DiffusionDPO, FlowDPO
from diffalign.finetune.trainer import StepFailed
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from tests.finetune.tiny_training import gradient, perturb

TEXTS = ["a b", "c d", "e", "f g h"]
PAIRS = [Pair(Prompt(text, 10 + i), b"", b"", f"row {i}") for i, text in enumerate(TEXTS)]
BOTH = [(tiny_sd, DiffusionDPO), (tiny_sd3, FlowDPO)]


def trainer(make=tiny_sd, method=DiffusionDPO, pairs=PAIRS, dtype=torch.float32, scheduler=None, **settings):
    """A trainer whose pairs have random latents; images are the business of other tests."""
    policy = Policy.wrap(make(dtype, **(scheduler or {})))
    policy.add_lora(rank=2, alpha=2)
    t = method(policy, pairs=pairs, **({"num_prompts_per_step": 4, "beta": 20.0} | settings))
    generator = torch.Generator().manual_seed(2)
    shape = policy.latent_shape()
    table = {p.id: torch.randn(2, *shape, generator=generator, dtype=policy.state_dtype) for p in t.prompts}
    t.latents = lambda prompts: torch.stack([table[p.id] for p in prompts])
    return t


def by_diffusers(t, x0, noise, at, prompt):
    """Errors (2,) of policy and reference on the two latents of a pair, by the pipeline's own network and scheduler."""
    pipe, embeds = t.policy.pipe, t.policy.encode([prompt.text] * 2).tensors
    both = noise.expand_as(x0)
    if isinstance(t, FlowDPO):
        x, target = (1 - at / 1000) * x0 + at / 1000 * both, both - x0
        told = {"encoder_hidden_states": embeds["prompt_embeds"], "pooled_projections": embeds["pooled_prompt_embeds"]}
        predict = lambda: pipe.transformer(hidden_states=x, timestep=at.float().expand(2), **told).sample  # noqa: E731
    else:
        time = at.long().expand(2)
        x = pipe.scheduler.add_noise(x0, both, time)
        v = pipe.scheduler.config.prediction_type == "v_prediction"
        target = pipe.scheduler.get_velocity(x0, both, time) if v else both
        predict = lambda: pipe.unet(x, time, encoder_hidden_states=embeds["prompt_embeds"]).sample  # noqa: E731
    ours = nn.functional.mse_loss(predict(), target, reduction="none").mean((1, 2, 3))
    t.policy.denoiser.disable_adapters()
    with torch.no_grad():
        base = nn.functional.mse_loss(predict(), target, reduction="none").mean((1, 2, 3))
    t.policy.denoiser.enable_adapters()
    return ours, base


@pytest.mark.parametrize(
    ("make", "method", "settings"),
    [
        (tiny_sd, DiffusionDPO, {}),
        (tiny_sd, DiffusionDPO, {"scheduler": {"prediction_type": "v_prediction"}}),
        (tiny_sd3, FlowDPO, {}),
        (tiny_sd3, FlowDPO, {"beta_schedule": "timestep"}),
        (tiny_sd3, FlowDPO, {"sft_weight": 3.0}),
    ],
    ids=["epsilon", "v_prediction", "constant", "timestep", "sft"],
)
def test_loss_and_gradient_are_those_of_the_formula_in_float64(make, method, settings):
    t = trainer(make, method, dtype=torch.float64, **settings)
    perturb(t.policy)
    t.step = 3
    sums, ledger = t.accumulate(t.prompts)
    found = gradient(t)
    t.optimizer.zero_grad()
    losses, right = [], 0
    level, noise, latents = t.level(t.prompts), t.noise(t.prompts), t.latents(t.prompts)
    for i, prompt in enumerate(t.prompts):
        ours, base = by_diffusers(t, latents[i], noise[i : i + 1], level.timestep[i], prompt)
        beta = 20.0 * ((1 - level.timestep[i] / 1000) ** 2 if settings.get("beta_schedule") else 1.0)
        inside = -beta / 2 * ((ours[0] - base[0]) - (ours[1] - base[1]))
        losses.append(-torch.log(1 / (1 + torch.exp(-inside))) + settings.get("sft_weight", 0) * ours[0])
        right += float(inside.detach()) > 0
    (sum(losses) / 4).backward()
    # diffusers keeps its tables in float32, and timesteps are told in float32.
    torch.testing.assert_close(sums["loss"], sum(losses).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, gradient(t), rtol=1e-4, atol=1e-6 * float(found.abs().max()))
    assert found.abs().max() > 0
    assert float(sums["implicit_accuracy"]) == right
    assert (ledger.denoiser_evaluations, ledger.backward_passes, ledger.reward_calls) == (16, 8, 0)


@pytest.mark.parametrize(("make", "method"), BOTH)
def test_the_first_loss_is_ln_2(make, method):
    row = trainer(make, method).train(PROMPTS, steps=1).rows[0]
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert row["implicit_margin"] == row["implicit_chosen"] == row["prediction_mse"] == 0
    assert row["implicit_accuracy"] == 0.5
    assert row["grad_norm"] > 0


PROMPTS = [pair.prompt for pair in PAIRS]


@pytest.mark.parametrize(("make", "method"), BOTH)
def test_the_two_images_of_a_pair_share_time_and_noise_and_no_others_do(make, method):
    t = trainer(make, method)
    seen = []
    predict = t.policy.predict
    t.policy.predict = lambda x, level, *rest: seen.append((x, level)) or predict(x, level, *rest)
    t.accumulate(t.prompts)
    assert len(seen) == 2
    (x, level), (again, _) = seen
    assert torch.equal(x, again), "the reference sees the very states of the policy"
    assert torch.equal(level.timestep[:4], level.timestep[4:])
    assert len(level.timestep[:4].unique()) == 4
    clean = t.latents(t.prompts).transpose(0, 1).flatten(0, 1)
    alpha, sigma = (c.float().reshape(-1, 1, 1, 1) for c in (level.alpha, level.sigma))
    noise = ((x - alpha * clean) / sigma).chunk(2)
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(noise[0][0], noise[0][1], atol=0.1)
    first = t.noise(t.prompts)
    t.step = 1
    assert not torch.equal(t.noise(t.prompts), first)
    assert not torch.equal(t.level(t.prompts).timestep, level.timestep[:4])


def test_training_levels_are_uniform_over_the_schedulers_timesteps():
    t = trainer(pairs=[Pair(Prompt("a", i), b"", b"", "") for i in range(2000)])
    level = t.level(t.prompts)
    assert level.timestep.min() < 5
    assert level.timestep.max() > 994
    assert level.timestep.mean() == pytest.approx(499.5, abs=4 * 288.7 / 2000**0.5)
    table = t.policy.pipe.scheduler.alphas_cumprod.double()[level.timestep.long()]
    torch.testing.assert_close(level.alpha**2, table)
    torch.testing.assert_close(level.sigma**2, 1 - table)


def test_a_choice_of_three_in_four_is_learned_as_log_3():
    """One prompt, two images a and b, and a prediction theta that does not look at x: m = beta mean[(b - a) theta].

    Noise and time cancel, for both images share them. Where a was chosen in three of four pairs the loss is least at
    sigmoid(m) = 3/4, m = ln 3, whatever beta is.
    """
    policy = Policy.wrap(tiny_sd3())
    theta, on = nn.Parameter(torch.zeros(1, *policy.latent_shape())), [1.0]

    @contextmanager
    def reference():
        on[0] = 0.0
        yield
        on[0] = 1.0

    policy.trainable, policy.reference = (lambda: {"theta": theta}), reference
    policy.evaluate = lambda x, timestep, condition: (theta * on[0]).expand_as(x)
    pairs = [Pair(Prompt("a b", i), b"", b"", "") for i in range(4)]
    # With a large epsilon and no momentum Adam is plain gradient descent, which ends at the fixed point.
    descent = {"adam_epsilon": 1.0, "adam_beta1": 0.0, "adam_weight_decay": 0.0, "learning_rate": 10.0}
    t = FlowDPO(policy, pairs=pairs, beta=7.0, num_prompts_per_step=4, **descent)
    a, b = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    t.latents = lambda prompts: torch.stack([torch.stack([b, a] if p.id == 3 else [a, b]) for p in prompts])
    history = t.train(t.prompts, steps=40)
    assert 7.0 * float(((b - a) * theta).mean().detach()) == pytest.approx(math.log(3), rel=1e-3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert history["loss"][0] == pytest.approx(math.log(2))
    assert history["loss"][-1] == pytest.approx(entropy, rel=1e-4)
    assert history["implicit_accuracy"][-1] == 0.75


def test_micro_batches_do_not_change_the_gradient():
    found = []
    for size in ("auto", 3):
        t = trainer(micro_batch_size=size)
        perturb(t.policy)
        sums, _ = t.accumulate(t.prompts)
        found.append((gradient(t), float(sums["loss"])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5 * float(found[0][0].abs().max()))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_resumed_training_equals_uninterrupted_training():
    settings = {"make": tiny_sd3, "method": FlowDPO, "learning_rate": 3e-3, "num_prompts_per_step": 2}
    whole = trainer(**settings)
    rows = whole.train(whole.prompts, steps=3).rows
    first, second = trainer(**settings), trainer(**settings)
    first.train(first.prompts, steps=1)
    perturb(second.policy)
    second.load_state_dict(first.state_dict())
    resumed = second.train(second.prompts, steps=2).rows
    assert all(torch.equal(p, q) for p, q in zip(second.parameters, whole.parameters, strict=True))
    for name in ("loss", "grad_norm", "implicit_margin", "prediction_mse"):
        assert [row[name] for row in resumed] == [row[name] for row in rows[1:]]


def encoded_pairs():
    """Three pairs of four images: one is in all of them."""
    files = []
    for colour in ("red", "blue", "lime", "white"):
        buffer = BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return [Pair(Prompt(f"a {'bcd'[i]}", i), files[0], files[i + 1], f"row {i}") for i in range(3)]


def test_runs_that_share_a_cache_encode_once_and_train_alike(tmp_path):
    def run(folder):
        policy = Policy.wrap(tiny_sd())
        policy.add_lora(rank=2, alpha=2)
        calls = {"vae": 0, "text": 0}
        encode, encode_one = policy.pipe.vae.encode, policy.encode_one
        policy.pipe.vae.encode = lambda *of: calls.update(vae=calls["vae"] + 1) or encode(*of)
        policy.encode_one = lambda *of: calls.update(text=calls["text"] + 1) or encode_one(*of)
        t = DiffusionDPO(policy, pairs=encoded_pairs(), num_prompts_per_step=3, beta=20.0, cache=folder)
        return t.train(t.prompts, steps=3)["loss"], calls

    alone, calls = run(None)
    assert calls == {"vae": 4, "text": 3}
    assert run(str(tmp_path / "cache")) == (alone, {"vae": 4, "text": 3})
    assert run(str(tmp_path / "cache")) == (alone, {"vae": 0, "text": 0})


def test_what_cannot_be_trained_is_told_in_words():
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline is a flow, .* diffusion_dpo is not for one: use flow_dpo"
    ):
        trainer(tiny_sd3, DiffusionDPO)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline is a diffusion, .* use diffusion_dpo"):
        trainer(tiny_sd, FlowDPO)
    with pytest.raises(ValueError, match="group_size = 4: a pair has its two images; leave group_size at 1"):
        trainer(group_size=4)
    stranger = DiffusionDPO(Policy.wrap(tiny_sd()), pairs=PAIRS, num_prompts_per_step=1)
    with pytest.raises(ValueError, match=r"prompt 'a b' is not that of a pair: train on trainer\.prompts"):
        stranger.train(["a b"], steps=1)
    t = trainer()
    t.latents = lambda prompts: torch.full((4, 2, *t.policy.latent_shape()), torch.inf)
    with pytest.raises(StepFailed, match="the gradient is not finite"):
        t.train(t.prompts, steps=1)
