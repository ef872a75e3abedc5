"""Methods of recorded trajectories on tiny real pipelines: what holds on the first update, and their gradients."""

import copy
import math
from itertools import combinations

import pytest
import torch

from diffalign.data import Prompt
from diffalign.finetune import DDPO, PRDP, B2DiffuRL, FlowGRPO
from diffalign.finetune.b2_diffurl import best_and_worst
from diffalign.finetune.prdp import prdp_loss
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import log_probs
from tests.finetune.tiny_training import draws_nan, redness

PROMPTS = ["a red circle", "a blue cube"]
COMMON = {"num_inference_steps": 4, "guidance_scale": 2.0, "num_prompts_per_step": 2, "group_size": 3}
METHODS = {
    "ddpo": (DDPO, tiny_sd, {"advantage": "group"}),
    "loud": (DDPO, tiny_sd, {"advantage": "group", "min_std": 0.1}),
    "history": (DDPO, tiny_sd, {"history_least": 4, "num_minibatches": 2}),
    "score": (DDPO, tiny_sd, {"estimator": "score", "advantage": "rloo"}),
    "b2": (B2DiffuRL, tiny_sd, {"select_threshold": 0.0, "window_start": 0.5}),
    "grpo": (FlowGRPO, tiny_sd3, {"kl_weight": 0.1}),
    "fast": (FlowGRPO, tiny_sd3, {"window": 2}),
    "cps": (FlowGRPO, tiny_sd3, {"noise": "cps", "ratio_norm": True, "clip_range": 2e-6}),
    "dance": (FlowGRPO, tiny_sd3, {"noise": "dance_grpo", "timestep_fraction": 0.6}),
    "prdp": (PRDP, tiny_sd, {"beta": 0.1, "clip_range": 1e-3}),
    "prdp of a flow": (PRDP, tiny_sd3, {"beta": 0.1, "clip_range": 1e-3, "num_inner_epochs": 2}),
}


def trainer(name, reward=redness, dtype=torch.float32, **settings):
    method, make, own = METHODS[name]
    torch.manual_seed(0)
    policy = Policy.wrap(make(dtype))
    policy.add_lora(rank=2, alpha=2)
    return method(policy, reward, **COMMON | own | settings)


def watch(t):
    """The parts and steps that the trainer minimises, before its gradients are used."""
    seen, kept = [], t.minimise

    def minimise(part):
        result = kept(part)
        seen.append((part, t.law(), t.trained(part.trajectory), result[0], [p.grad.clone() for p in t.parameters]))
        return result

    t.minimise = minimise
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_on_the_first_update_the_policy_is_the_old_one(name):
    """The ratio is exactly 1, nothing is clipped, and at the reference KL is exactly 0, in micro-batches too."""
    for size in ("auto", 3, 1):
        t = trainer(name, num_inner_epochs=1, num_minibatches=1, micro_batch_size=size)
        row = t.train(PROMPTS, steps=1).rows[0]
        # Of branches the best and the worst alone are evaluated: beside other rows than they were sampled with.
        assert row["ratio"] == (pytest.approx(1, abs=1e-6) if name == "b2" and size != 1 else 1)
        assert row["clip_fraction"] == 0
        assert row["kl"] == 0 if name in ("grpo", "prdp", "prdp of a flow") else "kl" not in row
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["ddpo", "grpo", "prdp"])
def test_in_bfloat16_too(name):
    """Whose rounding is a hundred times the clip range: what is sampled together is evaluated together."""
    row = trainer(name, dtype=torch.bfloat16, num_inner_epochs=1, num_minibatches=1).train(PROMPTS, steps=1).rows[0]
    assert (row["ratio"], row["clip_fraction"]) == (1, 0)
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["history", "b2", "fast", "prdp"])
def test_a_probe_of_memory_leaves_a_gradient_and_nothing_else(name):
    """As `footprint` asks for it: of groups of one, all rows at once."""
    t = trainer(name)
    t.training = t.training.model_copy(update={"group_size": 1, "micro_batch_size": "auto"})
    before = copy.deepcopy(t.state_dict())
    t.probe([Prompt(text, i) for i, text in enumerate(PROMPTS)])
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in t.parameters)
    torch.testing.assert_close(t.state_dict(), before, rtol=0, atol=0)


def test_no_more_densities_than_a_micro_batch_are_differentiated_at_once(monkeypatch):
    """PRDP's second pass may mix rows and steps: with `auto` it takes as many at once as there are samples."""
    t = trainer("prdp")
    sizes, predict = [], t.policy.predict

    def count(x, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(x))
        return predict(x, *args, **kwargs)

    monkeypatch.setattr(t.policy, "predict", count)
    t.train(PROMPTS, steps=1)
    assert max(sizes) == 6
    assert sum(sizes) > 6


@pytest.mark.parametrize("name", ["ddpo", "grpo", "prdp"])
def test_micro_batches_do_not_change_the_gradient(name):
    gradients = []
    for size in ("auto", 2):
        t = trainer(name, micro_batch_size=size)
        seen = watch(t)
        t.train(PROMPTS, steps=1)
        gradients.append(torch.cat([g.flatten() for g in seen[0][-1]]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-2 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", ["ddpo", "loud", "score", "grpo", "dance"])
def test_the_first_gradient_is_that_of_reinforce(name):
    """- A grad log p, by densities that `log_probs` evaluates as a whole, over samples and trained steps."""
    t = trainer(name)
    seen = watch(t)
    t.train(PROMPTS, steps=1)
    part, law, steps, _, found = seen[0]
    again = trainer(name)
    for p in again.parameters:
        p.grad = None
    density = log_probs(
        again.policy, part.trajectory, part.condition, law, t.schedule,
        guidance_scale=t.guidance_scale, reduction="mean", steps=steps,
    )  # fmt: skip
    (-(part.advantages.to(density)[:, None] * density).mean()).backward()
    for p, gradient in zip(again.parameters, found, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("size", ["auto", 2])
def test_an_early_step_is_charged_with_what_later_steps_diverge(size):
    """Away from the reference and without advantages: the gradient of the steps' KL, and the score function of where
    they lead, about the mean of the others of a group."""
    t = trainer("grpo", reward=lambda images, *_: images.new_ones(len(images)), micro_batch_size=size)
    with torch.no_grad():
        for p in t.parameters:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    seen = watch(t)
    before = [p.detach().clone() for p in t.parameters]
    t.train(PROMPTS, steps=1)
    with torch.no_grad():
        for p, value in zip(t.parameters, before, strict=True):
            p.copy_(value)
            p.grad = None
    part, _, steps, _, found = seen[0]
    later, loss, elements = torch.zeros(len(part)), 0.0, part.trajectory.latents[0].numel()
    for step in reversed(steps):
        now = t.transition(part.trajectory, part.condition, step)
        with torch.no_grad(), t.policy.reference():
            reference = t.transition(part.trajectory, part.condition, step)
        density, kl = now.log_prob(part.trajectory.states[step + 1], "mean"), now.kl(reference, "mean")
        others = (later.reshape(2, 3).sum(1, keepdim=True) - later.reshape(2, 3)) / 2
        loss = loss + (0.1 * kl + 0.1 * (later - others.flatten()) * density).mean() / len(steps)
        later = later + elements * kl.detach()
    loss.backward()
    assert later.std() > 0.1
    gradient, expected = (torch.cat([g.flatten() for g in each]) for each in (found, [p.grad for p in t.parameters]))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("min_std", [0.0, 0.1])
def test_the_charge_does_not_depend_on_how_many_steps_are_trained(min_std):
    """The mean gradient over all choices of two steps is that of all loud steps."""
    t = trainer("grpo", min_std=min_std)
    with torch.no_grad():
        for p in t.parameters:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    prompts = [Prompt(text, i) for i, text in enumerate(PROMPTS)]
    part, _ = t.collect(prompts)
    t.weigh([part], prompts)

    def gradient(steps):
        for p in t.parameters:
            p.grad = None
        t.trained = lambda trajectory: steps
        t.minimise(part)
        return torch.cat([p.grad.flatten() for p in t.parameters])

    loud = t.loud_steps(part.trajectory.stochastic)
    assert len(loud) == (4 if min_std == 0 else 3)
    whole = gradient(loud)
    mean = torch.stack([gradient(list(two)) for two in combinations(loud, 2)]).mean(0)
    torch.testing.assert_close(mean, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_advantages_are_those_of_the_rewards():
    t = trainer("ddpo")
    seen = watch(t)
    t.train(PROMPTS, steps=1)
    part = seen[0][0]
    rewards = part.rewards.reshape(2, 3)
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(part.advantages, expected.flatten())


def test_prompts_of_one_text_and_two_ids_are_two_groups():
    """Grouped by their text, as in flow_grpo's statistics, the six would be one."""
    t = trainer("ddpo")
    seen = watch(t)
    t.train([Prompt(PROMPTS[0], 0), Prompt(PROMPTS[0], 1)], steps=1)
    advantages = seen[0][0].advantages.reshape(2, 3)
    assert advantages.abs().max() > 0.1
    torch.testing.assert_close(advantages.sum(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["history", "prdp of a flow"])
def test_a_resumed_run_is_bit_equal(name):
    whole, first, second = (trainer(name) for _ in range(3))
    expected = whole.train(PROMPTS, steps=3).rows[-1]
    first.train(PROMPTS, steps=2)
    second.load_state_dict(first.state_dict())
    found = second.train(PROMPTS, steps=1).rows[-1]
    clocks = {"seconds", "peak_memory_bytes", "samples_per_s"}
    assert {k: v for k, v in found.items() if k not in clocks} == {k: v for k, v in expected.items() if k not in clocks}
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)


def test_updates_of_a_step():
    """Each epoch has an update for each minibatch; later ones see ratios away from 1."""
    t = trainer("ddpo", num_inner_epochs=2, num_minibatches=2, learning_rate=1e-2)
    seen = watch(t)
    row = t.train(PROMPTS, steps=1).rows[0]
    assert len(seen) == 4
    assert [part is seen[i - 2][0] for i, (part, *_) in enumerate(seen)][2:] == [True, True]
    assert float(seen[0][3]["ratio"]) == 3  # of each of the part's three samples 1
    assert float(seen[2][3]["ratio"]) != 3
    assert row["reward"] == pytest.approx(float(torch.cat([seen[0][0].rewards, seen[1][0].rewards]).mean()), rel=1e-5)
    assert row["decodes"] == row["reward_calls"] == 6


def test_a_failed_score_trains_nothing():
    """A group of failed scores changes nothing, and the others train as if it were not there."""

    def failing(images, prompts, metadata):
        values = redness(images, prompts, metadata)
        return torch.where(torch.tensor([p == PROMPTS[0] for p in prompts]), math.nan, values)

    for name in ("ddpo", "prdp"):
        t = trainer(name, failing)
        seen = watch(t)
        row = t.train(PROMPTS, steps=1).rows[0]
        assert row["reward_failures"] == 3
        assert row["grad_norm"] > 0
        assert math.isfinite(row["reward"])
        assert seen[0][0].rewards.isnan().sum() == 3


@pytest.mark.parametrize("name", ["ddpo", "grpo", "prdp"])
def test_a_sample_that_is_not_finite_trains_nothing(name):
    """Nor is it held to the reference: the gradient is that of a sample whose score alone failed."""

    def failing(images, prompts, metadata):
        values = redness(images, prompts, metadata)
        values[:1] = math.nan
        return values

    gradients = []
    for value in (None, math.nan, math.inf):
        t = trainer(name, failing if value is None else redness, num_inner_epochs=1)
        with torch.no_grad():
            for p in t.parameters:
                p.add_(0.05)
        if value is not None:
            draws_nan(t, 0, value)
        seen = watch(t)
        t.train(PROMPTS, steps=1)
        gradients.append(torch.cat([g.flatten() for g in seen[0][-1]]))
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_groups_without_spread_are_counted_and_cost_nothing():
    t = trainer("ddpo", lambda images, prompts, metadata: torch.ones(len(images)))
    row = t.train(PROMPTS, steps=1).rows[0]
    assert (row["zero_variance"], row["ratio"], row["clip_fraction"]) == (1, 1, 0)
    assert row["grad_norm"] == 0
    assert row["backward_passes"] == 0


def test_without_a_gradient_the_weights_stay_however_many_processes_there_are(monkeypatch):
    """Zeros in its place would have Adam move them on, by the gradients of the steps before."""
    t = trainer("ddpo")
    t.train(PROMPTS, steps=1)
    before = copy.deepcopy(t.state_dict())
    monkeypatch.setattr(type(t.accelerator), "num_processes", 2)
    monkeypatch.setattr(t.accelerator, "reduce", lambda tensor, reduction: tensor)
    t.optimizer.zero_grad()
    t._sum_gradients()
    t.optimizer.step()
    torch.testing.assert_close(t.state_dict(), before, rtol=0, atol=0)
    t.parameters[1].grad = torch.ones_like(t.parameters[1])
    t._sum_gradients()
    assert [p.grad is not None for p in t.parameters] == [i == 1 for i in range(len(t.parameters))]
    assert (t.parameters[1].grad == 1).all()


def test_branches_that_do_not_train_cost_no_gradient():
    t = trainer("b2", group_size=6, advantage="group")
    row = t.train(PROMPTS, steps=1).rows[0]
    window = 2  # of four steps, with guidance, the best and the worst of each prompt
    assert row["backward_passes"] == 2 * window * 4
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["ddpo", "grpo", "prdp"])
def test_all_processes_make_the_same_calls_where_weights_are_divided(name, monkeypatch):
    """A divided network's call needs all processes: under FSDP what trains nothing is evaluated, without a gradient."""

    def failing(images, prompts, metadata):
        values = redness(images, prompts, metadata)
        return torch.where(torch.tensor([p == PROMPTS[0] for p in prompts]), math.nan, values)

    gradients, calls = [], []
    for _ in range(2):
        t = trainer(name, failing)
        seen = watch(t)
        row = t.train(PROMPTS, steps=1).rows[0]
        gradients.append(torch.cat([g.flatten() for g in seen[0][-1]]))
        calls.append(row["backward_passes"])
        monkeypatch.setattr(type(t.policy), "blocks_are_sharded", True)
    assert calls[1] == 2 * calls[0] == 6 * len(seen[0][2]) * 2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_a_minibatch_without_any_score_is_no_failure_of_the_step():
    """And means of rewards are over all scores of the step."""

    def failing(images, prompts, metadata):
        values = torch.arange(len(images)) * 1.0
        return torch.where(torch.tensor([p == PROMPTS[0] for p in prompts]), math.nan, values)

    t = trainer("ddpo", failing, num_minibatches=2)
    row = t.train(PROMPTS, steps=1).rows[0]
    assert (row["reward"], row["reward_failures"]) == (1, 3)
    assert row["grad_norm"] > 0


def test_prdp_loss():
    """Against the double sum of the paper, with clipping in both directions and a tie."""
    generator = torch.Generator().manual_seed(0)
    now, old = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    rewards = torch.tensor([1.0, 3.0, 3.0, 0.5, math.nan, 2.0], dtype=torch.float64)
    total, pairs = 0.0, 0
    for g in (0, 3):
        for a in range(g, g + 3):
            for b in range(g, g + 3):
                if not rewards[a] > rewards[b]:
                    continue
                target = (rewards[a] - rewards[b]) / 0.7
                clip = now.clamp(old - 0.2, old + 0.2).sum(1)
                total += max((now[a].sum() - now[b].sum() - target) ** 2, (clip[a] - clip[b] - target) ** 2)
                pairs += 1
    assert pairs == 3
    assert float(prdp_loss(now, old, rewards, 3, 0.7, 0.2)) == pytest.approx(float(total))


def test_ratio_norm_is_the_shift_along_the_noise():
    """GRPO-Guard's log-ratio is mean(dmu . eps) for x = mu_old + S eps, of mean 0."""
    from diffalign.laws import Normal

    t = trainer("cps")
    generator = torch.Generator().manual_seed(0)
    old = Normal(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.1, 0.7]))
    now = Normal(old.mean + 0.01 * torch.randn(2, 4, 8, 8, generator=generator), old.std)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    expected = ((now.mean - old.mean) * noise).mean((1, 2, 3))
    torch.testing.assert_close(t.log_ratio(now, old, old.sample(noise)), expected, rtol=1e-3, atol=1e-7)


def test_the_best_and_the_worst_branch_train():
    """If they reach the threshold; a NaN is neither, and of equal ones the first is taken."""
    advantages = torch.tensor([[0.2, 1.5, -0.1, -1.6], [0.4, -0.4, 0.0, 0.0], [math.nan, 2.0, -0.5, 2.0]])
    expected = torch.tensor([[0, 1.5, 0, -1.6], [0, 0, 0, 0], [0, 2.0, -0.5, 0]])
    assert torch.equal(best_and_worst(advantages, 0.5), expected)


@pytest.mark.parametrize(
    ("name", "min_std", "expected"), [("ddpo", 0.1, [0, 1]), ("prdp", 0.03, [0, 1, 2]), ("fast", 0.8, [1])]
)
def test_steps_that_draw_little_are_not_trained(name, min_std, expected):
    """Of stds of .78, .52, .04 and .02, and of .70 and .87 in the window of a flow."""
    t = trainer(name, min_std=min_std, num_inner_epochs=1, num_minibatches=1)
    seen = watch(t)
    row = t.train(PROMPTS, steps=1).rows[0]
    assert seen[0][2] == expected
    assert row["backward_passes"] == 2 * 6 * len(expected)  # of both halves of guidance
    assert row["grad_norm"] > 0


def test_the_window_grows_to_all_steps():
    t = trainer("b2", max_train_steps=8, window_start=0.5)
    seen = watch(t)
    t.train(PROMPTS, steps=8)
    trained = [steps for _, _, steps, *_ in seen]
    assert trained == [list(range(4 - m, 4)) for m in (2, 2, 3, 3, 3, 3, 4, 4)]
    assert seen[0][0].trajectory.states[0] is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: trainer("grpo", group_size=1), "group_size = 1, and flow_grpo compares"),
        (lambda: trainer("prdp", group_size=1), "group_size = 1, and prdp compares"),
        (lambda: trainer("b2", group_size=1), "group_size = 1, and b2_diffurl compares"),
        (lambda: trainer("ddpo", group_size=1), "group_size = 1, and ddpo compares"),
        (lambda: trainer("cps", num_inference_steps=1), "no step of this chain draws noise"),
        (
            lambda: trainer("ddpo", min_std=0.9),
            "min_std = 0.9 leaves no step to train on, whose noise is 0.782 at most",
        ),
        (lambda: trainer("b2", min_std=0.1), "min_std = 0.1 leaves no step to train on, whose noise is 0.0412 at most"),
        (
            lambda: trainer("fast", min_std=0.3, window_share=1.0, num_inference_steps=10),
            "can start at step 7, where 2 in a row draw a noise of 0.282 at most, and min_std = 0.3 leaves none",
        ),
        (
            lambda: trainer("b2", kl_weight=0.1, timestep_fraction=0.5),
            "timestep_fraction = 0.5 trains one of 2 steps, and what later ones diverge is then unknown",
        ),
        (lambda: trainer("prdp", timestep_fraction=0.5), "timestep_fraction"),
        (lambda: trainer("ddpo", num_minibatches=3), "does not divide the 2 prompts"),
        (lambda: trainer("score", num_inner_epochs=2), "2 updates a step train on"),
        (lambda: trainer("history", history_size=3), "history_least = 4 is more than history_size = 3"),
        (lambda: trainer("grpo", advantage="history"), "advantage"),
        (lambda: trainer("fast", window=9), "longer than num_inference_steps = 4"),
        (lambda: FlowGRPO(Policy.wrap(tiny_sd()), redness, group_size=2, noise="cps"), "is that of a flow"),
    ],
)
def test_wrong_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
