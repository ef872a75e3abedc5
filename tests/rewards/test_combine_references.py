"""PAR and the log-sigmoid conjunction: references by prompt, by metadata, and what happens where there are none."""

import math

import pytest
import torch

from diffalign.rewards import as_reward
from diffalign.rewards.references import PAR, LogSigmoid, reference_rewards
from tests.rewards.channels import A, B, channel, fails_on, pixels, prompts


def test_par_is_the_mean_preference_over_the_references():
    x = pixels(2)
    value = PAR(channel(0), {"prompt 0": [0.2, 0.9], "prompt 1": 0.4})(x, prompts(2)).value
    a, b = x[:, 0, 0, 0]
    expected = [(torch.sigmoid(a - 0.2) + torch.sigmoid(a - 0.9)) / 2, torch.sigmoid(b - 0.4)]
    torch.testing.assert_close(value, torch.stack(expected))


def test_par_of_a_sample_as_good_as_its_reference_is_a_half_and_bounded():
    x = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 1, 1)
    value = PAR(channel(0, scale=200), dict.fromkeys(prompts(3), 100.0))(x, prompts(3)).value
    torch.testing.assert_close(value, torch.tensor([0.0, 0.5, 1.0]))


def test_references_are_measured_on_samples_and_failed_ones_left_out():
    x = pixels(4)
    texts = ["a", "b", "a", "c"]
    found = reference_rewards(texts, fails_on(0, "c")(x, texts))
    assert found == {"a": x[[0, 2], 0, 0, 0].tolist(), "b": x[1:2, 0, 0, 0].tolist()}
    assert PAR(channel(0), found)(x, texts).valid.tolist() == [True, True, True, False]


def test_a_prompt_without_a_reference_is_a_failed_score():
    score = PAR(channel(0), {"prompt 0": 0.5})(pixels(2).requires_grad_(), prompts(2))
    assert score.valid.tolist() == [True, False]
    assert score.reasons == {1: "par(red): no reference reward of prompt 'prompt 1'"}
    assert score.value.requires_grad


def test_references_are_read_from_metadata():
    whole = PAR(channel(0), "reference")
    assert whole.needs == ("prompt", "reference")
    metadata = [{"reference": 0.3}, {"reference": [0.1, 0.2]}, {}, {"reference": math.nan}, {"reference": []}]
    x = pixels(5)
    score = whole(x, prompts(5), metadata)
    assert score.valid.tolist() == [True, True, False, False, False]
    assert score.reasons[2] == "par(red): its metadata has no 'reference'"
    assert "nan is not one or more finite numbers" in score.reasons[3]
    assert "[] is not one or more finite numbers" in score.reasons[4]
    first = x[1, 0, 0, 0]
    torch.testing.assert_close(score.value[1], (torch.sigmoid(first - 0.1) + torch.sigmoid(first - 0.2)) / 2)


@pytest.mark.parametrize("wrong", [math.inf, "0.5", [], [1.0, None]])
def test_a_reference_that_is_no_number_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="finite numbers"):
        PAR(channel(0), {"a": wrong})


def test_needs_name_the_prompt_only_where_it_is_read():
    blind = as_reward(lambda i, p, m: i.mean((1, 2, 3)), name="blind")
    blind.needs = ()
    assert PAR(blind, {"a": 1.0}).needs == ("prompt",)
    assert LogSigmoid([(blind, 1)], {"blind": 0.5}).needs == ()
    assert LogSigmoid([(blind, 1)], {"blind": "tau"}).needs == ("tau",)


def test_log_sigmoid_is_the_log_probability_of_all_properties():
    x = pixels(6)
    whole = LogSigmoid([(channel(0), 1), (channel(1), 1)], {A: 0.3, B: 0.6})
    both = torch.sigmoid(x[:, 0, 0, 0] - 0.3) * torch.sigmoid(x[:, 1, 0, 0] - 0.6)
    torch.testing.assert_close(whole(x, prompts(6)).value.exp(), both)


def test_what_is_bad_already_weighs_most():
    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None, None].expand(3, 3, 1, 1).clone()
    x.requires_grad_()
    LogSigmoid([(channel(0), 3)], {A: 0.5}, {A: 0.01})(x, prompts(3)).value.sum().backward()
    expected = torch.tensor([300.0, 150.0, 0.0], dtype=torch.float64)  # w / s far below, half at tau, 0 far above
    torch.testing.assert_close(x.grad[:, 0, 0, 0], expected, atol=1e-10, rtol=1e-10)


def test_log_sigmoid_stays_finite_far_below_its_threshold():
    value = LogSigmoid([(channel(0), 1)], {A: 0.5}, {A: 1e-4})(torch.zeros(1, 3, 1, 1), prompts(1)).value
    assert value.item() == pytest.approx(-5000)


def test_thresholds_by_prompt_and_by_metadata():
    whole = LogSigmoid([(channel(0), 1), (channel(1), 1)], {A: {"prompt 0": 0.2, "prompt 1": [0.1, 0.3]}, B: "tau"})
    x = pixels(3)
    score = whole(x, prompts(3), [{"tau": 0.7}] * 3)
    assert score.valid.tolist() == [True, False, False]
    assert "2 thresholds" in score.reasons[1]
    assert "no reference reward of prompt 'prompt 2'" in score.reasons[2]
    expected = torch.sigmoid(x[0, 0] - 0.2).log() + torch.sigmoid(x[0, 1] - 0.7).log()
    torch.testing.assert_close(score.value[0], expected[0, 0])


def test_what_a_log_sigmoid_cannot_take_is_refused():
    with pytest.raises(ValueError, match="no threshold of reward 'red'"):
        LogSigmoid([(channel(0), 1)], {B: 0.5})
    with pytest.raises(ValueError, match="not above 0"):
        LogSigmoid([(channel(0), -1)], {A: 0.5})
    with pytest.raises(ValueError, match="each must be a number above 0"):
        LogSigmoid([(channel(0), 1)], {A: 0.5}, {A: 0.0})
