"""Statistics measured beforehand, and constraints by multipliers that follow the means."""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from diffalign.rewards.constraints import Lagrangian
from diffalign.rewards.ensembles import mean
from diffalign.rewards.statistics import StandardisedSum, Statistics, measure
from tests.rewards.channels import A, B, C, channel, fails_on, pixels, prompts, table


def test_measured_statistics_are_numpys_over_all_batches():
    x, whole = pixels(50), channel(0, scale=7, shift=3) + fails_on(1, "prompt 2")
    batches = [whole(x[i : i + 20], prompts(50)[i : i + 20]) for i in (0, 20, 40)]
    found = measure(batches)
    red, green = table(x)[:2].numpy()
    assert found[A].mean == pytest.approx(np.mean(7 * red + 3), rel=1e-12)
    assert found[A].std == pytest.approx(np.std(7 * red + 3), rel=1e-12)
    assert found[B].std == pytest.approx(np.std(np.delete(green, 2)), rel=1e-12)


def test_robust_statistics_are_the_standard_deviation_of_normal_scores_and_ignore_wild_ones():
    normal = NormalDist(0.5, 0.1)
    quantiles = [normal.inv_cdf((i + 0.5) / 2000) for i in range(2000)]
    x = torch.tensor(quantiles)[:, None, None, None].repeat(1, 3, 1, 1).clamp(0, 1)
    x[:20] = 1.0  # the lowest hundredth gone wild
    score = channel(0)(x, prompts(2000))
    robust, plain = measure([score], robust=True)[A], measure([score])[A]
    red = table(x)[0].numpy()
    assert robust.mean == pytest.approx(np.median(red), rel=1e-12)
    deviation = np.median(np.abs(red - np.median(red)))
    assert robust.std == pytest.approx(deviation / NormalDist().inv_cdf(0.75), rel=1e-12)
    assert robust.std == pytest.approx(0.1, rel=0.02)
    assert plain.std > 0.107


def test_standardised_scores_have_mean_zero_and_width_one_where_they_were_measured():
    x = pixels(40)
    found = measure([channel(0)(x, prompts(40))])
    z = StandardisedSum([(channel(0), 1.0)], found)
    value = z(x, prompts(40)).value
    assert value.mean().item() == pytest.approx(0, abs=1e-12)
    assert value.std(correction=0).item() == pytest.approx(1, rel=1e-12)
    assert z.name == "z(red)"
    assert StandardisedSum([(channel(0), 1), (channel(1), -0.5)], {**found, B: Statistics(0, 1)}).name == (
        "z(red) + -0.5*z(green)"
    )


def test_a_combination_is_standardised_by_its_own_name():
    inner = mean(channel(0), channel(1))
    x = pixels(40)
    found = measure([(inner + channel(2))(x, prompts(40))])
    assert set(found) == {A, B, C, inner.name}
    value = StandardisedSum([(inner, 1.0)], found)(x, prompts(40)).value
    assert value.std(correction=0).item() == pytest.approx(1, rel=1e-12)


def test_scores_without_width_are_refused():
    same = torch.full((5, 3, 1, 1), 0.5)
    with pytest.raises(ValueError, match="'red' have width 0: its scores are all equal"):
        measure([channel(0)(same, prompts(5))])
    same[0] = 1.0
    with pytest.raises(ValueError, match="more than half of its scores are equal, take robust=False"):
        measure([channel(0)(same, prompts(5))], robust=True)
    with pytest.raises(ValueError, match="has 1 valid scores"):
        measure([channel(0)(same[:1], prompts(1))])
    for mean_, std in ((0.0, 0.0), (math.nan, 1.0), (0.0, math.inf), (0.0, -1.0)):
        with pytest.raises(ValueError, match="std above 0"):
            Statistics(mean_, std)
    with pytest.raises(ValueError, match="no statistics of reward 'red'"):
        StandardisedSum([(channel(0), 1.0)], {B: Statistics(0, 1)})
    with pytest.raises(ValueError, match="not finite"):
        StandardisedSum([(channel(0), math.inf)], {A: Statistics(0, 1)})


def test_multipliers_follow_the_means():
    whole = Lagrangian(channel(0), [(channel(1), 0.5), (channel(2), 0.2)], rate=2.0)
    assert whole.name == "red | green>=0.5, blue>=0.2"
    x = pixels(3)
    torch.testing.assert_close(whole(x, prompts(3)).value, x[:, 0, 0, 0])  # no constraint counts at first
    whole.observe({B: torch.tensor([0.1, 0.3, math.nan]), C: 0.9})
    assert whole.multipliers == pytest.approx({B: 0.6, C: 0.0})  # 0 - 2 (0.2 - 0.5); max(0, 0 - 2 (0.9 - 0.2))
    value = x[:, 0, 0, 0] + 0.6 * (x[:, 1, 0, 0] - 0.5)
    torch.testing.assert_close(whole(x, prompts(3)).value, value)
    whole.observe({B: 0.55, C: torch.tensor([math.nan])})
    assert whole.multipliers == pytest.approx({B: 0.5, C: 0.0})


def test_dual_descent_finds_the_constrained_optimum():
    """Maximise -(x - 1)^2 / 2 where -x >= -0.3: x = 0.3, and the multiplier is the slope there, 0.7."""
    x = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    objective = mean(lambda i, p, m: -((i[:, 0, 0, 0] - 1) ** 2) / 2)
    bounded = -channel(0)
    whole = Lagrangian(objective, [(bounded, -0.3)], rate=0.2)
    for _ in range(120):
        leaf = x.clone().requires_grad_()
        score = whole(leaf, prompts(1))
        whole.observe(score.parts)
        score.value.sum().backward()
        x = (x + 0.5 * leaf.grad).clamp(0, 1)
    assert x[0, 0].item() == pytest.approx(0.3, abs=1e-4)
    assert whole.multipliers[bounded.name] == pytest.approx(0.7, abs=1e-4)


def test_the_state_is_plain_numbers_and_comes_back():
    first = Lagrangian(channel(0), [(channel(1), 0.5), (channel(2), 0.5)], rate=1.0)
    first.observe({B: 0.1, C: 0.3})
    saved = first.state_dict()
    state = json.loads(json.dumps(saved))
    second = Lagrangian(channel(0), [(channel(1), 0.5), (channel(2), 0.5)], rate=1.0)
    second.load_state_dict(state)
    x = pixels(3)
    assert torch.equal(first(x, prompts(3)).value, second(x, prompts(3)).value)
    first.observe({B: 0.1, C: 0.3})
    assert second.multipliers == pytest.approx({B: 0.4, C: 0.2})  # its own, not shared
    assert saved == state
    with pytest.raises(ValueError, match="constraints are on"):
        second.load_state_dict({"multipliers": {B: 0.1}})
    with pytest.raises(ValueError, match="at least 0"):
        second.load_state_dict({"multipliers": {B: -0.1, C: 0.0}})


def test_multipliers_do_not_enter_the_graph():
    whole = Lagrangian(channel(0), [(channel(1), 0.5)], rate=1.0)
    score = whole(pixels(2).requires_grad_(), prompts(2))
    whole.observe(score.parts)
    assert isinstance(whole.multipliers[B], float)


def test_what_a_lagrangian_cannot_take_is_refused():
    for constraints in ([], [(channel(1), 0.5), (channel(1), 0.7)]):
        with pytest.raises(ValueError, match="a Lagrangian takes one on each"):
            Lagrangian(channel(0), constraints, rate=1.0)
    with pytest.raises(ValueError, match="must be finite"):
        Lagrangian(channel(0), [(channel(1), math.nan)], rate=1.0)
    with pytest.raises(ValueError, match="rate is 0"):
        Lagrangian(channel(0), [(channel(1), 0.5)], rate=0.0)
    with pytest.raises(ValueError, match="no scores of reward 'green'"):
        Lagrangian(channel(0), [(channel(1), 0.5)], rate=1.0).observe({A: 0.3})
