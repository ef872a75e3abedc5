"""Plans: which steps carry gradient, drawn once, within bounds, and refused in words where they make no sense."""

from collections import Counter

import pytest

from diffalign.noise import generator
from diffalign.rollout import DRTune, Full, LastK, Plan, RandomK


def plans(rule, steps: int, draws: int = 300) -> list[Plan]:
    return [rule.plan(steps, generator(0, "truncation", i)) for i in range(draws)]


def test_deterministic_rules() -> None:
    assert Full().plan(3, generator(0, "truncation", 0)) == Plan((0, 1, 2))
    assert LastK(2).plan(5, generator(0, "truncation", 0)) == Plan((3, 4))


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


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LastK(9), "gradient through k = 9 of 8 steps: use 1 to 8"),
        (LastK(0), "use 1 to 8"),
        (RandomK(0, 4), "random k from 0 to 4 of 8 steps"),
        (RandomK(5, 4), "use 1 <= low <= high <= steps"),
        (DRTune(9), "gradient at k = 9 of 8 steps"),
        (DRTune(3, 1.0), r"early_stop = 1.0 is outside \[0, 1\)"),
    ],
)
def test_rules_that_do_not_fit_are_refused_in_words(rule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rule.plan(8, generator(0, "truncation", 0))
