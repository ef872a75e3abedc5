"""The regularisers of optimised noise against closed forms, and on a checkerboard that the norm cannot see."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffalign.noise import generator, normal
from diffalign.search.gaussianity import REGULARISERS, chi, chi_of_size, covariance, spectrum

SHAPE = (4, 16, 16)
SIZE = math.prod(SHAPE)


class InOrder:
    """A generator whose permutations leave everything where it is."""

    def permutation(self, count):
        return np.arange(count)


def white(rows, dtype=torch.float64):
    return normal(SHAPE, seed=0, purpose="test", rows=[(i,) for i in range(rows)], dtype=dtype)


def checkerboard():
    """Ones and minus ones, of the most probable norm."""
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(SHAPE[1] // 2, SHAPE[2] // 2)
    return sign.expand(1, *SHAPE) * math.sqrt((SIZE - 1) / SIZE)


def coins(number=0):
    return generator(0, "test", number)


def test_chi_is_the_law_of_the_norm():
    noise = white(6) * torch.tensor([0.2, 0.9, 1.0, 1.05, 1.5, 4.0], dtype=torch.float64).view(-1, 1, 1, 1)
    norms = noise.flatten(1).norm(dim=1).numpy()
    law = stats.chi(SIZE)
    assert np.allclose(chi(noise), law.logpdf(norms) - law.logpdf(math.sqrt(SIZE - 1)), rtol=1e-9, atol=1e-9)
    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(chi(noise).sum(), noise)
    factor = (SIZE - 1) / torch.from_numpy(norms).square() - 1
    assert torch.allclose(gradient, factor.view(-1, 1, 1, 1) * noise, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chi_of_a_large_latent_keeps_its_digits(dtype):
    """The card's magnitude: 5 % of drift at 16,384 elements costs 40 nats."""
    flat = normal((16384,), seed=0, purpose="large", rows=[(0,)]).to(dtype)
    exact = chi(flat.double())
    assert float(chi(flat)) == pytest.approx(float(exact), abs=1e-3)
    assert float(chi(flat / flat.float().norm() * math.sqrt(16383) * 1.05)) == pytest.approx(-40.5, abs=1.0)


def test_a_share_of_the_norm_costs_the_same_at_every_size():
    for size in (1024, 16384, 65536):
        drifted = torch.full((1, size), 1.05 * math.sqrt((size - 1) / size), dtype=torch.float64)
        at_reference = (16384 - 1) * (math.log(1.05) - (1.05**2 - 1) / 2)
        assert float(chi_of_size(drifted, coins())) == pytest.approx(at_reference, rel=1e-3)


def test_the_spectrum_of_white_noise_is_at_its_floor():
    """Means of 16 Rayleigh numbers about sqrt(pi) / 2, drawn by numpy, and the two moments' own spreads."""
    values = torch.stack([spectrum(white(20), coins(i)) for i in range(5)])
    rng = np.random.default_rng(0)
    bins = np.abs(rng.rayleigh(math.sqrt(0.5), (100_000, 16)).mean(1) - math.sqrt(math.pi) / 2).mean()
    moments = math.sqrt(2 / math.pi / SIZE) * (1 + math.sqrt(0.5))  # E|N(0, 1/n)| and E|N(0, 1/2n)|
    assert float(-values.mean()) == pytest.approx(25 * bins + moments, rel=0.02)


def test_the_spectrum_of_a_cosine_is_known():
    """One frequency holds everything: |X_k| / sqrt(n) is sqrt(n / 2) there and 0 elsewhere, in 32 bins of 16."""
    n, white_mean = 1026, math.sqrt(math.pi) / 2
    wave = math.sqrt(2) * torch.cos(2 * math.pi * 100 * torch.arange(n, dtype=torch.float64) / n)[None]
    known = 25 * (31 * white_mean + abs(math.sqrt(n / 2) / 16 - white_mean)) / 32
    assert float(-spectrum(wave, InOrder())) == pytest.approx(known, rel=1e-9)
    moments = 0.2 + math.sqrt(1.1**2 + 0.2**2) - 1
    known = moments + 25 * (31 * white_mean + abs(1.1 * math.sqrt(n / 2) / 16 - white_mean)) / 32
    assert float(-spectrum(1.1 * wave + 0.2, InOrder())) == pytest.approx(known, rel=1e-9)


def test_the_last_bin_has_what_is_left():
    """n = 38 has 18 frequencies: 16 and 2. The wave is in the bin of two."""
    wave = math.sqrt(2) * torch.cos(2 * math.pi * 18 * torch.arange(38, dtype=torch.float64) / 38)[None]
    known = 25 * (math.sqrt(math.pi) / 2 + abs(math.sqrt(19) / 2 - math.sqrt(math.pi) / 2)) / 2
    assert float(-spectrum(wave, InOrder())) == pytest.approx(known, rel=1e-9)


def test_the_covariance_of_equal_blocks_is_known():
    """Blocks v: mean v and second moment v v', so ||C - I|| = max(||v||^2 - 1, 1)."""
    v, m = torch.tensor([1.5, -0.5, 1.0, 0.5], dtype=torch.float64), 256
    square = float(v @ v)
    first = math.log(2) - m * square / 8
    second = math.log(2) - m * (math.sqrt(1 + max(square - 1, 1)) - 1 - math.sqrt(4 / m)) ** 2 / 2
    assert float(covariance(v.repeat(1, m), InOrder())) == pytest.approx(2 * (first + second), rel=1e-12)


def test_the_covariance_of_white_noise_costs_next_to_nothing():
    value = covariance(white(20), coins())
    assert (value <= 0).all()
    assert float(value.mean()) > -0.3
    assert (covariance(1.5 * white(20), coins()) < -10).all()


@pytest.mark.parametrize("name", REGULARISERS)
def test_gradients_are_those_of_finite_differences(name):
    noise = normal((40,), seed=1, purpose="test", rows=[(0,), (1,)], dtype=torch.float64) * 1.6 + 0.4
    assert torch.autograd.gradcheck(lambda x: REGULARISERS[name](x, coins()), (noise.requires_grad_(),))


@pytest.mark.parametrize("name", REGULARISERS)
def test_rows_do_not_see_each_other(name):
    noise = white(3) * 1.3
    alone = torch.cat([REGULARISERS[name](row[None], coins()) for row in noise])
    assert torch.allclose(REGULARISERS[name](noise, coins()), alone, rtol=1e-12)


def test_a_checkerboard_is_perfect_to_the_norm_and_not_to_the_others():
    board = checkerboard().requires_grad_()
    value = chi(board)
    (gradient,) = torch.autograd.grad(value.sum(), board)
    assert float(value.detach().abs()) < 1e-12
    assert float(gradient.abs().max()) < 1e-12
    noise, board = white(20), board.detach()
    assert float(spectrum(board, coins())) < float(spectrum(noise, coins()).min()) - 5
    assert float(covariance(board, coins())) < float(covariance(noise, coins()).min()) - 90


def test_a_permutation_alone_does_not_see_a_checkerboard():
    """Why the row as it lies is looked at as well."""
    order = torch.from_numpy(coins(7).permutation(SIZE))
    shuffled = checkerboard().flatten(1)[:, order]
    floor = spectrum(white(20), coins())
    assert float(spectrum(shuffled, coins())) > float(floor.min()) - 0.3


def test_the_spectrum_leads_away_from_a_checkerboard_and_the_norm_does_not():
    start = checkerboard() + 0.1 * white(1)
    reached = {}
    for name in ("chi", "spectrum"):
        noise = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([noise], lr=0.03)
        for i in range(150):
            optimizer.zero_grad()
            (-REGULARISERS[name](noise, coins(i)).sum()).backward()
            optimizer.step()
        reached[name] = float(spectrum(noise.detach(), coins()))
    before, typical = float(spectrum(start, coins())), float(spectrum(white(20), coins()).mean())
    assert reached["chi"] == pytest.approx(before, abs=0.3)
    assert reached["spectrum"] > typical
