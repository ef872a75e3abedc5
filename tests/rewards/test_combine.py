"""What every combination keeps: closed forms, gradients, one failure one sample, nesting; harmonic, hinge, gate."""

import logging
import math

import numpy as np
import pytest
import torch

from diffalign.rewards import Reward, Score, as_reward, check_gradient
from diffalign.rewards.combination import Combination, WeightedSum
from diffalign.rewards.combine import Gate, Harmonic, Hinge
from diffalign.rewards.constraints import Lagrangian
from diffalign.rewards.ensembles import Mean, SoftMin, UncertaintyWeighted, WorstCase, mean, minimum
from diffalign.rewards.pareto import ParetoRank
from diffalign.rewards.references import PAR, LogSigmoid
from diffalign.rewards.statistics import StandardisedSum, Statistics
from tests.rewards.channels import A, B, C, channel, fails_on, pixels, prompts, table

REFERENCES = {f"prompt {i}": [0.1 * i, 0.3] for i in range(9)}


def lagrangian(a, b, c):
    whole = Lagrangian(a, [(b, 0.4), (c, 0.9)], rate=0.5)
    whole.load_state_dict({"multipliers": {B: 2.0, C: 0.25}})
    return whole


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# name -> (the combination of three rewards, the same in numpy from their scores (3, N))
CASES = {
    "sum": (lambda a, b, c: a + 2 * b - 0.5 * c, lambda r: r[0] + 2 * r[1] - 0.5 * r[2]),
    "standardised": (
        lambda a, b, c: StandardisedSum([(a, 1), (b, -2), (c, 0.5)], {A: Z, B: Z, C: Statistics(-1, 4)}),
        lambda r: (r[0] - 0.5) / 0.2 - 2 * (r[1] - 0.5) / 0.2 + 0.5 * (r[2] + 1) / 4,
    ),
    "mean": (lambda *m: mean(*m), lambda r: r.mean(0)),
    "worst": (lambda *m: minimum(*m), lambda r: r.min(0)),
    "uwo": (lambda *m: UncertaintyWeighted(m, 0.7), lambda r: r.mean(0) - 0.7 * r.var(0)),
    "softmin": (lambda *m: SoftMin(m, 0.3), lambda r: -0.3 * np.log(np.mean(np.exp(-r / 0.3), axis=0))),
    "logsigmoid": (
        lambda a, b, c: LogSigmoid([(a, 1), (b, 2), (c, 1)], {A: 0.5, B: 0.2, C: 0.9}, {B: 0.1}),
        lambda r: np.log(sigmoid(r[0] - 0.5)) + 2 * np.log(sigmoid((r[1] - 0.2) / 0.1)) + np.log(sigmoid(r[2] - 0.9)),
    ),
    "par": (
        lambda a, b, c: PAR(a + b + c, REFERENCES),
        lambda r: np.array([np.mean([sigmoid(x - m) for m in (0.1 * i, 0.3)]) for i, x in enumerate(r.sum(0))]),
    ),
    "harmonic": (
        lambda a, b, c: Harmonic([(a, 0.3), (b, 0.7), (c, 2)]),
        lambda r: 3 / (0.3 / (r[0] + 1e-8) + 0.7 / (r[1] + 1e-8) + 2 / (r[2] + 1e-8)),
    ),
    "hinge": (lambda a, b, c: Hinge(a + b + c, 1.4), lambda r: np.minimum(r.sum(0), 1.4)),
    "gate": (
        lambda a, b, c: Gate(a + b, c, at_least=0.5, otherwise=-1),
        lambda r: np.where(r[2] >= 0.5, r[0] + r[1], -1),
    ),
    "lagrangian": (lagrangian, lambda r: r[0] + 2 * (r[1] - 0.4) + 0.25 * (r[2] - 0.9)),
    "nested": (
        lambda a, b, c: minimum(Hinge(a, 0.6), 0.5 * mean(b, c) + 0.1 * a) - PAR(b, REFERENCES),
        lambda r: (
            np.minimum(np.minimum(r[0], 0.6), 0.25 * (r[1] + r[2]) + 0.1 * r[0])
            - np.array([np.mean([sigmoid(x - m) for m in (0.1 * i, 0.3)]) for i, x in enumerate(r[1])])
        ),
    ),
}
Z = Statistics(0.5, 0.2)


def build(name, *members):
    return CASES[name][0](*(members or (channel(0), channel(1), channel(2))))


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_formula(name):
    x = pixels(9)
    score = build(name)(x, prompts(9))
    np.testing.assert_allclose(score.value.numpy(), CASES[name][1](table(x).numpy()), rtol=1e-12)
    assert score.valid.all()
    for index, part in enumerate((A, B, C)):
        assert torch.equal(score.parts[part], x[:, index, 0, 0])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    reward = build(name)
    assert reward.differentiable
    assert torch.autograd.gradcheck(lambda x: reward(x, prompts(9)).value, pixels(9).requires_grad_())
    assert check_gradient(reward, pixels(9), prompts(9)).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_a_failed_member_fails_its_sample_and_spoils_no_gradient(name):
    def gradients(reward, keep):
        x = pixels(9)[keep].requires_grad_()
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)  # as of a network that all samples share
        score = reward(x * weight, [prompts(9)[i] for i in keep])
        torch.where(score.valid, score.value, 0.0).sum().backward()
        return score, x.grad, weight.grad

    everyone, others = list(range(9)), [i for i in range(9) if i != 4]
    score, gradient, shared = gradients(build(name, channel(0), fails_on(1, "prompt 4"), channel(2)), everyone)
    truth, expected, expected_shared = gradients(build(name), others)
    assert score.valid.tolist() == [i != 4 for i in range(9)]
    assert score.value[4].isnan()
    assert f"{B}: the score is nan" in score.reasons[4]
    torch.testing.assert_close(score.value[others], truth.value)
    torch.testing.assert_close(gradient[others], expected)
    assert gradient[4].eq(0).all()
    torch.testing.assert_close(shared, expected_shared)


@pytest.mark.parametrize("name", CASES)
def test_scores_do_not_depend_on_the_batch(name):
    reward, x = build(name), pixels(9, dtype=torch.float32)
    whole = reward(x, prompts(9)).value
    alone = torch.cat([reward(x[i : i + 1], prompts(9)[i : i + 1]).value for i in range(9)])
    assert whole.dtype == torch.float32
    assert torch.equal(whole, alone)


def test_a_combination_that_is_no_number_leaves_the_others_their_gradient():
    class Log(Combination):
        def combine(self, rows):
            return rows.values[0].sub(0.5).log()

    x = torch.tensor([0.4, 0.5, 0.75], dtype=torch.float64)[:, None, None, None].expand(3, 3, 1, 1)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    score = Log([channel(0)], "log")(x * weight, prompts(3))
    assert score.valid.tolist() == [False, False, True]
    assert score.reasons == {0: "log: the score is nan", 1: "log: the score is -inf"}
    torch.where(score.valid, score.value, 0.0).sum().backward()
    assert weight.grad.item() == pytest.approx(0.75 / 0.25)


def test_every_sample_failed():
    score = minimum(channel(0), fails_on(1, "prompt 0"))(pixels(1).requires_grad_(), prompts(1))
    assert not score.valid.any()
    assert score.value.isnan().all()
    assert not score.value.requires_grad


def test_a_member_that_is_in_twice_scores_once():
    calls = []
    counted = as_reward(lambda i, p, m: calls.append(1) or i[:, 0].mean((1, 2)), name="counted")
    Gate(counted, counted, at_least=0.5, otherwise=0.0)(pixels(3), prompts(3))
    assert len(calls) == 1


def test_parts_hold_every_reward_inside_under_its_name():
    inner = mean(channel(1), channel(2))
    x = pixels(4)
    parts = (channel(0) + Hinge(inner, 0.5))(x, prompts(4)).parts
    assert set(parts) == {A, B, C, "mean(green, blue)", "hinge(mean(green, blue), 0.5)"}
    torch.testing.assert_close(parts["mean(green, blue)"], x[:, 1:, 0, 0].mean(1))
    assert not any(part.requires_grad for part in parts.values())


def test_names_are_told_apart_at_any_depth():
    with pytest.raises(ValueError, match=r"two rewards of 'mean.*' are named 'red'"):
        mean(channel(0), Hinge(channel(1, name="red"), 1.0))
    shared = channel(0)
    assert mean(shared, Hinge(shared, 0.5)).name == "mean(red, hinge(red, 0.5))"
    assert [part.name for part in mean(shared, -shared).walk()] == ["mean(red, -1*red)", "red", "-1*red", "red"]
    assert minimum(shared, channel(1), channel(2)).name == "min(red, green, blue)"


def test_members_say_what_the_whole_needs():
    class Reads(Reward):
        name, needs, token_limit = "reads", ("style",), 77

        def values(self, images, prompts, metadata):
            return images[:, 0].mean((1, 2))

    class Short(Reads):
        name, needs, token_limit = "short", ("prompt",), 16

    whole = mean(Reads(), Short(), lambda i, p, m: i[:, 0].mean((1, 2)))  # functions are members too
    assert whole.needs == ("style", "prompt")
    assert whole.token_limit == 16
    assert not whole.differentiable  # Reads is not
    assert not whole(pixels(2).requires_grad_(), prompts(2)).value.requires_grad


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="Mean has no members"):
        Mean([])
    with pytest.raises(TypeError, match="neither a Reward nor a function"):
        Mean([channel(0), 3])
    video = channel(1)
    video.media = "video"
    with pytest.raises(ValueError, match="one combination scores one kind"):
        mean(channel(0), video)


def test_single_precision_and_double_mix():
    single = as_reward(lambda i, p, m: i[:, 1].mean((1, 2)).float(), name="single")
    x = pixels(3)
    value = mean(channel(0), single)(x, prompts(3)).value
    torch.testing.assert_close(value, x[:, :2, 0, 0].mean(1), rtol=1e-7, atol=0)


class Certain(Reward):
    """A channel with a standard deviation of its own."""

    differentiable = True

    def __init__(self, index, sigma):
        self.inner, self.sigma = channel(index), sigma
        self.name = self.inner.name

    def __call__(self, images, prompts, metadata=None):
        score = self.inner(images, prompts, metadata)
        sigma = None if self.sigma is None else torch.full_like(score.value, self.sigma)
        return Score(score.value, score.valid, score.parts, sigma, score.reasons)


def test_sums_hand_on_the_sigma_of_independent_errors():
    total = Certain(0, 3.0) - 2 * Certain(1, 2.0)
    assert total(pixels(2), prompts(2)).sigma.tolist() == [5.0, 5.0]
    z = StandardisedSum([(Certain(0, 3.0), 1), (Certain(1, 2.0), 1)], {A: Statistics(0, 1.0), B: Statistics(9, 0.5)})
    assert z(pixels(1), prompts(1)).sigma.tolist() == [5.0]
    assert (Certain(0, 3.0) + Certain(1, None))(pixels(1), prompts(1)).sigma is None
    failed = (Certain(0, 3.0) + fails_on(1, "prompt 0") * 1.0)(pixels(2), prompts(2))
    assert failed.sigma is None
    ensemble = mean(channel(0), fails_on(1, "prompt 0"))(pixels(2), prompts(2))
    assert ensemble.sigma.isnan().tolist() == [True, False]


def test_the_harmonic_mean_is_near_zero_where_one_member_is():
    whole = Harmonic([(channel(0), 1), (channel(1), 1)])
    x = torch.zeros(4, 3, 1, 1, dtype=torch.float64)
    x[0, 0], x[1, :2], x[2, 0], x[2, 1] = 1.0, 0.5, 1.0, 0.25
    x.requires_grad_()
    score = whole(x, prompts(4))
    assert score.valid.all()
    np.testing.assert_allclose(score.value.detach().numpy(), [0, 0.5, 0.4, 0], atol=3e-8)
    score.value.sum().backward()
    assert x.grad.isfinite().all()  # at zero too
    assert x.grad[0, 1].item() == pytest.approx(2, rel=1e-6)  # 2 ab / (a + b) at a = 1, b = 0: 2


def test_the_harmonic_mean_of_a_negative_score_is_a_failure_in_words():
    whole = Harmonic([(channel(0, shift=-0.5), 1), (channel(1), 1)])
    x = torch.full((2, 3, 1, 1), 0.75)
    x[1] = 0.25
    score = whole(x, prompts(2))
    assert score.valid.tolist() == [True, False]
    assert "red is -0.25, and a harmonic mean takes scores of at least 0" in score.reasons[1]
    for weight in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="weight"):
            Harmonic([(channel(0), weight)])


def test_rpo_is_the_harmonic_mean_of_mapped_cosines():
    cosines = channel(0, scale=2, shift=-1), channel(1, scale=2, shift=-1)
    unit = Statistics(-1.0, 2.0)
    mapped = [StandardisedSum([(cosine, 1.0)], {cosine.name: unit}) for cosine in cosines]
    x = pixels(5)
    image, text = x[:, 0, 0, 0], x[:, 1, 0, 0]  # (2 x - 1 + 1) / 2 = x
    value = Harmonic([(mapped[0], 0.3), (mapped[1], 0.7)])(x, prompts(5)).value
    torch.testing.assert_close(value, 1 / (0.3 / (image + 1e-8) + 0.7 / (text + 1e-8)))


def test_a_hinge_is_refl_without_its_constant():
    x = pixels(9).requires_grad_()
    hinged = Hinge(channel(0, scale=4), 2.0)(x, prompts(9)).value
    refl = torch.relu(2 - 4 * x[:, 0, 0, 0])
    torch.testing.assert_close(hinged, 2 - refl)
    first, second = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (hinged, -refl))
    assert torch.equal(first, second)
    assert 0 < (hinged == 2).sum() < 9  # both sides were seen


def test_a_closed_gate_is_a_score_without_gradient_and_its_judge_needs_none():
    judge = as_reward(lambda i, p, m: [float(v > 0.5) for v in i[:, 1, 0, 0]], name="judge", differentiable=False)
    gate = Gate(channel(0), judge, at_least=1.0, otherwise=-2.0)
    x = pixels(9).requires_grad_()
    score = gate(x, prompts(9))
    is_open = x[:, 1, 0, 0] > 0.5
    assert 0 < is_open.sum() < 9
    assert score.valid.all()
    torch.testing.assert_close(score.value, torch.where(is_open, x[:, 0, 0, 0], -2.0))
    score.value.sum().backward()
    assert torch.equal(x.grad[:, 0, 0, 0], is_open.double())
    with pytest.raises(ValueError, match="finite"):
        Gate(channel(0), judge, at_least=1.0, otherwise=-math.inf)
    with pytest.raises(ValueError, match="must be finite"):
        Hinge(channel(0), math.nan)


def test_operators_work_on_combinations():
    x, r = pixels(4), table(pixels(4))
    blue = channel(2)
    whole = 0.5 * minimum(channel(0), channel(1)) - (WorstCase([blue]) + mean(blue))
    assert isinstance(whole, WeightedSum)
    torch.testing.assert_close(whole(x, prompts(4)).value, 0.5 * torch.minimum(r[0], r[1]) - 2 * r[2])


def test_a_failure_of_the_combination_is_told_once(caplog):
    whole = PAR(channel(0), {"prompt 0": 0.5})
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        whole(pixels(3), prompts(3))
        whole(pixels(3), prompts(3))
    assert len(caplog.messages) == 1
    assert "no reference reward of prompt 'prompt 1'" in caplog.messages[0]


def test_groupwise_is_inherited():
    assert (channel(0) + ParetoRank([channel(1), channel(2)])).groupwise
    assert not (channel(0) + channel(1)).groupwise
