"""Plans: which steps carry gradient, drawn once, within bounds, and refused in words where they make no sense."""

from collections import Counter

import numpy as np
import pytest

from diffalign.noise import generator
from diffalign.rollout import DRTune, Full, LastK, LowVariance, Plan, RandomK, Sparse


def plans(rule, steps: int, draws: int = 300) -> list[Plan]:
    return [rule.plan(steps, generator(0, "truncation", i)) for i in range(draws)]


def test_deterministic_rules() -> None:
    assert Full().plan(3, generator(0, "truncation", 0)) == Plan((0, 1, 2))
    assert LastK(2).plan(5, generator(0, "truncation", 0)) == Plan((3, 4))
    assert LowVariance(2).plan(5, generator(0, "truncation", 0)) == Plan((4,), stop=4, renoised=2)
    assert LowVariance(1, skip=2).plan(5, generator(0, "truncation", 0)) == Plan((2,), stop=2, renoised=1)


def test_random_k_is_uniform_with_both_ends() -> None:
    counts = Counter(len(plan.graded) for plan in plans(RandomK(2, 5), 8, 2000))
    assert sorted(counts) == [2, 3, 4, 5]
    assert all(abs(count - 500) < 100 for count in counts.values())
    assert all(plan.graded[-1] == 7 and plan.stop is None for plan in plans(RandomK(2, 5), 8))


@pytest.mark.parametrize(("steps", "k"), [(20, 3), (10, 4), (5, 5), (4, 4)])
def test_drtune_steps_are_equally_spaced_and_stop_in_the_last_part(steps: int, k: int) -> None:
    drawn = plans(DRTune(k, 0.4), steps)
    window = round(0.4 * steps)
    assert {plan.stop for plan in drawn} == set(range(steps - window, steps))
    starts = set()
    for plan in drawn:
        assert plan.detach_input
        assert plan.graded[-1] <= plan.stop
        strides = {b - a for a, b in zip(plan.graded, plan.graded[1:], strict=False)}
        assert strides == {(plan.stop + 1) // len(plan.graded)}
        assert len(plan.graded) == min(k, plan.stop + 1)
        starts.add(plan.graded[0])
    assert (len(starts) > 1) == (steps > k)


def test_drtune_without_early_stop_runs_to_the_end() -> None:
    assert {plan.stop for plan in plans(DRTune(3, 0.0), 10)} == {None}
    assert {plan.stop for plan in plans(DRTune(1, 0.01), 10)} == {None}


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_sparse_draws_steps_without_replacement_and_late_ones_oftener(bias: float) -> None:
    """How often each of 5 steps is among k = 2, against the closed form of two draws one after the other."""
    draws, weight = 4000, np.arange(1, 6) ** bias / (np.arange(1, 6) ** bias).sum()
    second = [sum(weight[j] * weight[i] / (1 - weight[j]) for j in range(5) if j != i) for i in range(5)]
    drawn = plans(Sparse(2, bias), 5, draws)
    assert all(plan == Plan(plan.graded, detach_input=True) for plan in drawn)
    assert all(len(plan.graded) == 2 and plan.graded[0] < plan.graded[1] for plan in drawn)
    counts = Counter(i for plan in drawn for i in plan.graded)
    for i, expected in enumerate(weight + second):
        assert abs(counts[i] / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_sparse_at_every_step_is_drtune_without_a_stop() -> None:
    one = generator(0, "truncation", 0)
    assert Sparse(5).plan(5, one) == DRTune(5, 0.0).plan(5, one) == Plan((0, 1, 2, 3, 4), detach_input=True)
    assert Sparse(1, 5000.0).plan(5, one) == Plan((4,), detach_input=True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LastK(9), "gradient through k = 9 of 8 steps: use 1 to 8"),
        (LastK(0), "use 1 to 8"),
        (RandomK(0, 4), "random k from 0 to 4 of 8 steps"),
        (RandomK(5, 4), "use 1 <= low <= high <= steps"),
        (DRTune(9), "gradient at k = 9 of 8 steps"),
        (DRTune(3, 1.0), r"early_stop = 1.0 is outside \[0, 1\)"),
        (Sparse(9), "gradient at k = 9 of 8 steps: use 1 to 8"),
        (Sparse(2, -1.0), "late_bias = -1.0 is no bias: use a number such as 2, or 0 for uniform steps"),
        (Sparse(2, float("nan")), "late_bias = nan is no bias"),
        (LowVariance(0), r"n = 0 predictions from fresh noise: use 1 or more, or LastK\(1\) for none"),
        (LowVariance(2, skip=8), "skip = 8 leaves no step of 8: use 0 to 7"),
    ],
)
def test_rules_that_do_not_fit_are_refused_in_words(rule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rule.plan(8, generator(0, "truncation", 0))
