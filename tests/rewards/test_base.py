"""Sums, failures and the gradient proof, on rewards whose scores are known in closed form."""

import logging
import math

import numpy as np
import pytest
import torch

from diffalign.rewards import Reward, WeightedSum, as_reward, check_gradient, weighted_sum
from diffalign.rewards.memory import out_of_memory

PROMPTS = ["a", "b", "c", "d"]


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) ** 2


def test_any_function_is_a_reward():
    x = images()
    score = as_reward(brightness)(x, PROMPTS)
    assert torch.equal(score.value, x.mean(dim=(1, 2, 3)))
    assert score.valid.all()
    assert list(score.parts) == ["brightness"]
    assert as_reward(score_object := as_reward(brightness)) is score_object


def test_functions_may_return_lists_and_arrays_and_read_metadata():
    def counts(images, prompts, metadata):
        return [item["count"] + len(prompt) for prompt, item in zip(prompts, metadata, strict=True)]

    metadata = [{"count": i} for i in range(4)]
    assert as_reward(counts)(images(), PROMPTS, metadata).value.tolist() == [1, 2, 3, 4]
    array = as_reward(lambda i, p, m: np.arange(4) / 2, name="array")
    assert array(images(), PROMPTS).value.tolist() == [0, 0.5, 1, 1.5]


def test_operators_build_the_weighted_sum_they_say():
    a, b = as_reward(brightness), as_reward(redness)
    x = images()
    first, second = brightness(x, None, None), redness(x, None, None)
    cases = {
        a + 0.5 * b: first + 0.5 * second,
        a - b: first - second,
        -a * 2: -2 * first,
        0.5 * (a + b) - 3 * (b - a): 3.5 * first - 2.5 * second,
    }
    for reward, truth in cases.items():
        score = reward(x, PROMPTS)
        torch.testing.assert_close(score.value, truth)
        torch.testing.assert_close(score.parts[next(iter(score.parts))], first)  # parts are unweighted
    assert (a + 0.5 * b).name == "brightness + 0.5*redness"
    assert (a + 0.5 * b).differentiable
    assert not (a + as_reward(redness, differentiable=False)).differentiable


def test_a_part_that_is_in_twice_is_scored_once():
    calls = []
    reward = as_reward(lambda i, p, m: calls.append(1) or i.mean(dim=(1, 2, 3)), name="counted")
    total = reward + 2 * reward
    torch.testing.assert_close(total(images(), PROMPTS).value, 3 * images().mean(dim=(1, 2, 3)))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="named 'counted'"):
        reward + as_reward(redness, name="counted")


def test_weighted_sum_of_one_is_itself():
    reward = as_reward(brightness)
    assert weighted_sum([(reward, 1.0)]) is reward
    assert isinstance(weighted_sum([(reward, 0.5)]), WeightedSum)
    with pytest.raises(ValueError, match="not finite"):
        weighted_sum([(reward, math.inf)])
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum([])


def test_an_exception_costs_one_sample(caplog):
    def moody(images, prompts, metadata):
        if "b" in prompts:
            raise RuntimeError("no b today")
        return images.mean(dim=(1, 2, 3))

    reward = as_reward(moody)
    x = images().requires_grad_()
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        score = reward(x, PROMPTS)
        reward(x, PROMPTS)
    assert score.valid.tolist() == [True, False, True, True]
    assert score.value.isnan().tolist() == [False, True, False, False]
    assert score.reasons == {1: "RuntimeError: no b today"}
    torch.testing.assert_close(score.value[score.valid], x.mean(dim=(1, 2, 3))[score.valid])
    assert len(caplog.messages) == 1  # said once
    assert "no b today" in caplog.messages[0]
    score.value[score.valid].sum().backward()
    assert x.grad[1].eq(0).all()
    torch.testing.assert_close(x.grad[0], torch.full_like(x.grad[0], 1 / 90))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_left_out_of_value_and_gradient(bad):
    def poisoned(images, prompts, metadata):
        factor = images.new_tensor([bad if prompt == "c" else 2.0 for prompt in prompts])
        return images.mean(dim=(1, 2, 3)) * factor

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    score = as_reward(poisoned)(images() * weight, PROMPTS)
    assert score.valid.tolist() == [True, True, False, True]
    torch.where(score.valid, score.value, 0.0).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * images().mean(dim=(1, 2, 3))[[0, 1, 3]].sum())


def test_a_sum_is_valid_where_every_part_is():
    def fails_on(letter):
        return as_reward(
            lambda i, p, m: i.mean(dim=(1, 2, 3)) / torch.tensor([float(x != letter) for x in p]), name=f"no-{letter}"
        )

    score = (fails_on("a") + fails_on("d"))(images(), PROMPTS)
    assert score.valid.tolist() == [False, True, True, False]
    assert score.reasons == {0: "no-a: the score is inf", 3: "no-d: the score is inf"}
    assert score.value.isnan().tolist() == [True, False, False, True]


def test_every_score_failed():
    score = as_reward(lambda i, p, m: i.mean(dim=(1, 2, 3)) * math.nan, name="dead")(images().requires_grad_(), PROMPTS)
    assert not score.valid.any()
    assert len(score.reasons) == 4
    assert not score.value.requires_grad


def test_a_wrong_count_of_scores_is_a_failure_in_words():
    score = as_reward(lambda i, p, m: i.mean(), name="scalar")(images(), PROMPTS)
    assert not score.valid.any()
    assert "must return one score for each" in score.reasons[0]


def test_a_reward_without_gradient_builds_no_graph():
    score = as_reward(brightness, differentiable=False)(images().requires_grad_(), PROMPTS)
    assert not score.value.requires_grad


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((torch.zeros(4, 3, 5, 5, dtype=torch.uint8), PROMPTS), TypeError, "uint8"),
        (([1, 2], PROMPTS), TypeError, "list"),
        ((torch.zeros(4, 1, 5, 5), PROMPTS), ValueError, "B, 3, H, W"),
        ((torch.zeros(3, 3, 5, 5), PROMPTS), ValueError, "3 images, 4 prompts"),
        ((torch.zeros(4, 3, 5, 5), PROMPTS, [{}]), ValueError, "1 metadata"),
        ((torch.full((4, 3, 5, 5), 2.0), PROMPTS), ValueError, "never rescale"),
        ((torch.full((4, 3, 5, 5), -1.0), PROMPTS), ValueError, "from -1 to -1"),
        ((torch.zeros(0, 3, 5, 5), []), ValueError, "nothing to score"),
    ],
)
def test_a_broken_contract_is_an_error_and_not_a_failed_score(arguments, kind, words):
    with pytest.raises(kind, match=words):
        as_reward(brightness)(*arguments)


def test_what_cannot_be_a_reward_is_refused():
    with pytest.raises(TypeError, match="neither a Reward nor a function"):
        as_reward(3)
    with pytest.raises(TypeError, match=r"must take \(images, prompts, metadata\)"):
        as_reward(lambda images: images.mean())


def test_check_gradient_returns_its_norms():
    norms = check_gradient(as_reward(brightness), images(), PROMPTS)
    torch.testing.assert_close(norms, torch.full((4,), 1 / math.sqrt(90), dtype=torch.float64))
    with torch.inference_mode():
        assert check_gradient(as_reward(redness), images(), PROMPTS).shape == (4,)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda i, p, m: [0.0] * len(p), "carry no gradient"),
        (lambda i, p, m: i.detach().mean(dim=(1, 2, 3)), "carry no gradient"),
        (lambda i, p, m: (i * 255).round().mean(dim=(1, 2, 3)), "gradient of zero"),
        (lambda i, p, m: torch.ones(len(p), requires_grad=True) * 1, "gradient of zero"),
        (lambda i, p, m: (i - i).sum(dim=(1, 2, 3)).sqrt(), "not finite"),
        (lambda i, p, m: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_check_gradient_refuses_in_words(function, words):
    with pytest.raises(ValueError, match=words):
        check_gradient(as_reward(function, name="wrong"), images(), PROMPTS)


def test_check_gradient_refuses_what_says_it_has_none():
    with pytest.raises(ValueError, match="not differentiable"):
        check_gradient(as_reward(brightness, differentiable=False), images(), PROMPTS)


def test_a_subclass_needs_only_values():
    class Dark(Reward):
        name = "dark"
        differentiable = True

        def values(self, images, prompts, metadata):
            return 1 - images.mean(dim=(1, 2, 3))

    torch.testing.assert_close(Dark()(images(), PROMPTS).value, 1 - images().mean(dim=(1, 2, 3)))
    assert Dark().to("cpu").name == "dark"


def test_functions_of_trl_and_flow_grpo_work_unchanged():
    """They take (images, prompts, metadata) and return (scores, news); flow_grpo's return arrays."""

    def jpeg_like(images, prompts, metadata):
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return pixels.mean((1, 2, 3)) / 255, {"note": "as flow_grpo's"}

    def aesthetic_like(images, prompts, metadata):
        return images.clamp(0, 1).mean((1, 2, 3)), {}

    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = images.mean((1, 2, 3))
    score = as_reward(jpeg_like, differentiable=False)(images, ["a", "b"])
    torch.testing.assert_close(score.value.float(), expected, rtol=0, atol=2e-3)
    reward = as_reward(aesthetic_like)
    torch.testing.assert_close(reward(images, ["a", "b"]).value, expected)
    assert (check_gradient(reward, images, ["a", "b"]) > 0).all()


class Blind(Reward):
    """The mean of an image as a judge sees it that takes NaN for black."""

    name, differentiable = "blind", True

    def __init__(self):
        self.seen = []

    def values(self, images, prompts, metadata):
        self.seen.append(prompts)
        return images.nan_to_num(0.0).clamp(0, 1).mean((1, 2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_with_pixels_that_are_not_finite_fails_unseen(bad):
    x, reward = images(), Blind()
    x[1, 2, 0, 3] = bad
    leaf = x.clone().requires_grad_()
    score = reward(leaf, PROMPTS)
    assert reward.seen == [["a", "c", "d"]]
    assert score.reasons == {1: "the image has pixels that are not finite"}
    assert score.valid.tolist() == [True, False, True, True]
    torch.testing.assert_close(score.value[score.valid], x[[0, 2, 3]].mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(score.value[score.valid].sum(), leaf)
    assert not gradient[1].any()
    torch.testing.assert_close(gradient[[0, 2, 3]], torch.full((3, 3, 5, 6), 1 / 90, dtype=torch.float64))
    x[3] = 2.0  # the others are still held to the contract
    with pytest.raises(ValueError, match="never rescale"):
        reward(x, PROMPTS)
    assert not reward(torch.full((2, 3, 4, 4), bad), ["a", "b"]).valid.any()
    assert len(reward.seen) == 1


def test_it_leaves_its_group_and_the_others_are_scored_together():
    reward, x = Blind(), images()
    reward.groupwise = True
    reward.values = lambda images, prompts, metadata: images.mean((1, 2, 3)) - images.mean()  # from the group's mean
    x[2, 0, 0, 0] = math.nan
    score = reward(x, ["p"] * 4)
    rest = x[[0, 1, 3]]
    torch.testing.assert_close(score.value[[0, 1, 3]], rest.mean((1, 2, 3)) - rest.mean())
    assert list(score.reasons) == [2]


def test_a_failure_of_both_kinds_keeps_both_reasons():
    def moody(images, prompts, metadata):
        return images.mean((1, 2, 3)) / torch.tensor([float(prompt != "d") for prompt in prompts])

    x = images()
    x[0, 0, 0, 0] = math.nan
    score = as_reward(moody)(x, PROMPTS)
    assert score.reasons == {0: "the image has pixels that are not finite", 3: "the score is inf"}


class Counting(Reward):
    """The mean of an image; has memory for some of them, and breaks on a white one."""

    def __init__(self, error, most):
        self.name, self.error, self.most, self.seen = "counting", error, most, []

    def values(self, images, prompts, metadata):
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        if (images == 1).flatten(1).all(dim=1).any():
            raise ValueError("a white image")
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried"),
    ],
    ids=["device", "cpu"],
)
def test_a_batch_that_does_not_fit_is_halved_and_the_next_of_its_size_starts_there(error):
    reward = Counting(error, most=3)
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9
    for _ in range(2):
        torch.testing.assert_close(reward(images, ["p"] * 10).value, images.mean((1, 2, 3)))
    assert reward.seen == [10, 5, 2, 2, 1, 2, 2, 1, *[2] * 5]
    assert reward(torch.rand(4, 3, 8, 8), ["p"] * 4).valid.all()
    assert reward.seen[-3:] == [4, 2, 2]  # another size has a limit of its own


def test_another_failure_leaves_no_limit_behind():
    reward = Counting(None, most=8)
    images = torch.full((8, 3, 4, 4), 0.5)
    images[5] = 1
    score = reward(images, ["p"] * 8)
    assert score.valid.tolist() == [True] * 5 + [False] + [True] * 2
    assert score.reasons == {5: "ValueError: a white image"}
    assert reward.seen == [8, 4, 4, 2, 1, 1, 2]
    reward(images[:5].repeat(1, 1, 1, 1), ["p"] * 5)
    assert reward.seen[-1] == 5


def test_a_group_that_fails_has_failed_whole():
    reward = Counting(ValueError("no group today"), most=2)
    reward.groupwise = True
    score = reward(torch.rand(3, 3, 4, 4), ["p"] * 3)
    assert reward.seen == [3]
    assert score.reasons == dict.fromkeys(range(3), "ValueError: no group today")


def test_another_error_is_no_lack_of_memory():
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("not enough memory"))


class Uncertain(Reward):
    """Mean and standard deviation of an image."""

    differentiable, states_sigma, name = True, True, "uncertain"

    def values(self, images, prompts, metadata):
        if any(prompt == "broken" for prompt in prompts):
            raise ValueError("broken")
        flat = images.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1)], dim=1)


def test_a_reward_may_state_its_own_standard_deviation():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1, 0, 0, 0] = math.nan
    leaf = images.clone().requires_grad_()
    score = Uncertain()(leaf, ["p", "p", "broken", "p", "p"])
    good = [0, 3, 4]
    assert score.valid.tolist() == [True, False, False, True, True]
    torch.testing.assert_close(score.value[good], images[good].flatten(1).mean(1))
    torch.testing.assert_close(score.sigma[good], images[good].flatten(1).std(1))
    assert score.sigma[[1, 2]].isnan().all()
    assert not score.sigma.requires_grad
    (gradient,) = torch.autograd.grad(score.value[score.valid].sum(), leaf)
    torch.testing.assert_close(gradient[good], torch.full((3, 3, 4, 4), 1 / 48))
    assert not gradient[[1, 2]].any()
