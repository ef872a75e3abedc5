"""Rewards of noisy latents: the denoiser's own tokens, the gradient of finite differences, choices, and their files."""

import json

import pytest
import torch

from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux, tiny_lcm, tiny_pixart_alpha, tiny_sdxl
from diffalign.rewards.noisy import (
    Choices,
    NoisyHead,
    NoisyReward,
    accuracies,
    margin,
    noised,
    ranked_right,
    tie_margins,
)
from diffalign.rewards.noisy.trunk import GUIDANCE_TOLD

READ = [tiny_sd3, tiny_flux, tiny_sd, tiny_sdxl, tiny_lcm]
PROMPTS = ["a b", "c d e", "f"]


def reward(make=tiny_sd3, dtype=torch.float64, **how):
    policy = Policy.wrap(make(dtype))
    found = NoisyReward(policy, {"left": 1.0, "right": 0.5}, **({"blocks": 1, "hidden": 8} | how))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # the modulation starts at zero, where the time would not matter
        for parameter in found.heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return found


def states(policy, count=3):
    """Latents at different levels of a chain of 5 steps, and their prompts."""
    x = normal(
        policy.latent_shape(), seed=0, purpose="test", rows=[(i,) for i in range(count)], dtype=policy.state_dtype
    )
    return x, policy.schedule(5).level(torch.arange(count)), policy.encode(PROMPTS[:count])


@pytest.mark.parametrize("make", READ)
def test_the_trunk_reads_what_the_denoiser_itself_computes(make):
    found = reward(make)
    policy, kept = found.policy, []
    x, level, condition = states(policy)
    block = getattr(policy.denoiser, found.trunk.blocks_of)[0]
    hook = block.register_forward_hook(lambda module, given, output: kept.append(output))
    policy.evaluate(x, level.timestep.float(), policy.embed_guidance(condition, GUIDANCE_TOLD))
    hook.remove()
    tokens, _ = found.trunk(x, level, condition)
    own = kept[0][0].flatten(2).transpose(1, 2) if found.trunk.blocks_of == "down_blocks" else kept[0][1]
    assert torch.equal(tokens, own)


@pytest.mark.parametrize("make", READ)
def test_the_gradient_is_that_of_finite_differences(make):
    found = reward(make)
    x, level, condition = states(found.policy)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(found(x, level, condition).sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    step, tolerance = (3e-3, 1e-2) if make is tiny_flux else (1e-5, 1e-6)  # FLUX turns its queries in fp32
    with torch.no_grad():
        up, down = (found(x + h * way, level, condition) for h in (step, -step))
    slope = (gradient * way).flatten(1).sum(1)
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=tolerance, atol=1e-12)
    assert slope.abs().min() > 1e-9


def test_a_batch_scores_as_its_rows_do_alone():
    found = reward()
    x, level, condition = states(found.policy)
    together = found(x, level, condition)
    alone = [found(x[i : i + 1], level.rows(slice(i, i + 1)), condition.rows(slice(i, i + 1))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_the_score_knows_the_time_and_the_prompt():
    found = reward()
    x, level, condition = states(found.policy)
    scores = found.scores(x, level, condition)
    later = found.scores(x, found.policy.schedule(5).level(torch.tensor([3, 3, 3])), condition)
    assert ((scores - later).abs() > 1e-6).all()
    assert ((scores - found.scores(x, level, condition.rows([1, 2, 0]))).abs() > 1e-6).all()


def test_objectives_mix_by_the_weights_of_a_call():
    found = reward()
    given = states(found.policy)
    left, right = found.scores(*given).unbind(1)
    torch.testing.assert_close(found(*given), left + 0.5 * right)
    torch.testing.assert_close(found(*given, weights={"right": -2.0}), -2 * right)
    with pytest.raises(ValueError, match="'up' is unknown: this reward has left, right"):
        found(*given, weights={"up": 1.0})


def test_an_adapter_of_the_policy_does_not_change_the_score():
    found = reward()
    given = states(found.policy)
    before = found(*given)
    found.policy.add_lora(rank=2, alpha=2)
    with torch.no_grad():
        for parameter in found.policy.trainable().values():
            parameter.add_(0.5)
    assert not torch.equal(found.policy.evaluate(given[0], given[1].timestep.float(), given[2]), before)
    torch.testing.assert_close(found(*given), before, rtol=1e-12, atol=0)
    assert all(parameter.requires_grad for parameter in found.policy.trainable().values())


def test_it_comes_back_from_its_files(tmp_path):
    found = reward(dtype=torch.float32)
    folder = found.save(tmp_path / "reward")
    again = NoisyReward.load(folder, Policy.wrap(tiny_sd3()))
    assert again.weights == {"left": 1.0, "right": 0.5}
    assert torch.equal(again(*states(again.policy)), found(*states(found.policy)))
    assert {file.name for file in folder.iterdir()} == {"config.json", "heads.safetensors"}


def test_another_denoiser_and_other_files_are_refused(tmp_path):
    folder = reward(dtype=torch.float32).save(tmp_path)
    with pytest.raises(ValueError, match=r"made for a denoiser .*SD3.* and this policy's is .*UNet"):
        NoisyReward.load(folder, Policy.wrap(tiny_sd()))
    with pytest.raises(FileNotFoundError, match=r"holds no noise-aware reward: config\.json is missing"):
        NoisyReward.load(tmp_path / "elsewhere", Policy.wrap(tiny_sd3()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden": 9}))
    with pytest.raises(ValueError, match=r"heads.safetensors does not fit config.json"):
        NoisyReward.load(folder, Policy.wrap(tiny_sd3()))
    (folder / "config.json").write_text(json.dumps({"objectives": {"a": 1.0}}))
    with pytest.raises(ValueError, match="no key 'blocks'"):
        NoisyReward.load(folder, Policy.wrap(tiny_sd3()))


def test_what_cannot_be_read_is_said():
    with pytest.raises(ValueError, match="blocks = 3 of a SD3Transformer2DModel that has 2: use 1 to 2"):
        NoisyReward(Policy.wrap(tiny_sd3()), {"a": 1.0}, blocks=3)
    with pytest.raises(ValueError, match="does not read a PixArtTransformer2DModel: use a pipeline with one of SD3"):
        NoisyReward(Policy.wrap(tiny_pixart_alpha()), {"a": 1.0}, blocks=1)
    with pytest.raises(ValueError, match="objectives is empty"):
        NoisyReward(Policy.wrap(tiny_sd3()), {}, blocks=1)


def test_the_probabilities_of_a_head_add_up_and_ties_are_likeliest_between_equals():
    head = NoisyHead(4, 4, 4).double()
    margins = torch.linspace(-3, 3, 7, dtype=torch.float64)
    win, tie, loss = (head.log_probability(margins, torch.full_like(margins, o)).exp() for o in (1.0, 0.0, -1.0))
    torch.testing.assert_close(win + tie + loss, torch.ones_like(win))
    assert tie.argmax() == 3
    threshold = torch.log(torch.tensor(2.0, dtype=torch.float64))  # softplus(0), so theta is 2
    # Rao and Kupper's own form, with strengths pi = exp(r): pi_1 / (pi_1 + theta pi_2).
    torch.testing.assert_close(win, margins.exp() / (margins.exp() + threshold.exp()))


def test_both_sides_of_a_pair_get_the_same_noise_and_level():
    found = reward()
    schedule = found.policy.schedule(5)
    latents = torch.randn(2, 3, *found.policy.latent_shape(), dtype=torch.float64)
    noise = torch.randn(2, *found.policy.latent_shape(), dtype=torch.float64)
    level = schedule.level(torch.tensor([1, 4]))
    x, levels = noised(found, latents, level, noise)
    x = x.view(2, 3, *latents.shape[2:])
    for p in range(2):
        assert torch.equal(levels.timestep.view(2, 3)[p], level.timestep[p].expand(3))
        for g in range(3):
            taken = (x[p, g] - (1 - level.sigma[p]) * latents[p, g]) / level.sigma[p]
            torch.testing.assert_close(taken, noise[p])


def test_choices_come_from_values_with_ties_and_without_what_failed():
    values = torch.tensor([[[0.0], [1.0], [1.2]], [[2.0], [float("nan")], [0.0]]])
    margins = tie_margins(values, 0.3)
    assert 0.2 < margins.item() < 1.0
    found = Choices.from_values(torch.zeros(2, 3, 1, 1, 1), values, ["a", "b"], margins)
    expected = torch.tensor([[-1.0, -1.0, 0.0], [torch.nan, 1.0, torch.nan]])
    torch.testing.assert_close(found.outcome[..., 0], expected, equal_nan=True)
    assert margin(values)[0, :, 0].tolist() == pytest.approx([-1.0, -1.2, -0.2])


def test_wrong_choices_are_refused():
    latents = torch.zeros(1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="1 sample a prompt"):
        Choices(latents[:, :1], torch.zeros(1, 0, 1), ("a",))
    with pytest.raises(ValueError, match=r"outcome has shape \(1, 2, 1\)"):
        Choices(latents, torch.zeros(1, 2, 1), ("a",))
    with pytest.raises(ValueError, match=r"outcome 0.5: it is 1"):
        Choices(latents, torch.full((1, 1, 1), 0.5), ("a",))


def test_accuracy_is_one_a_half_and_nought_where_it_must_be():
    found = reward(dtype=torch.float32)
    latents = torch.randn(4, 3, *found.policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    level = found.policy.schedule(5).level(torch.full((12,), 5))  # the clean result
    condition = found.policy.encode([p for p in "abcd" for _ in range(3)])
    values = found.scores(latents.flatten(0, 1), level, condition).detach().view(4, 3, 2)
    own = Choices.from_values(latents, values, list("abcd"), torch.zeros(2))
    against = Choices(latents, -own.outcome, own.prompts)
    assert accuracies(found, own)["left"]["0"] == 1
    assert accuracies(found, against)["right"]["0"] == 0
    # Pure noise, the same on both sides: there is nothing to tell them by.
    assert accuracies(found, own)["left"]["1"] == 0.5
    right, decided = ranked_right(found, own, 0.0, batch=3)
    assert right.tolist() == decided.tolist() == [[3, 3]] * 4
