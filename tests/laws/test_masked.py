"""Masked diffusion on three tokens over three words: every state and every path can be enumerated."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical

from diffalign.laws import Categorical, Level, MaskedDiffusion
from tests.laws.problems import flow_levels

WORDS, LENGTH, MASK = 3, 3, 1  # the mask stands among the words: 0 and 2, 3 are words
TOKENS = [0, 2, 3]
LAW = MaskedDiffusion(MASK)
STATES = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=LENGTH)))
CLEAN = (STATES != MASK).all(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dependent() -> Tensor:
    """A law of the data over STATES, of dependent tokens."""
    weights = torch.where(CLEAN, (1.5 * draw(len(STATES), seed=3)).exp(), 0.0)
    return weights / weights.sum()


def independent() -> Tensor:
    each = draw(LENGTH, WORDS + 1, seed=4).softmax(1)
    each[:, MASK] = 0
    each = each / each.sum(1, keepdim=True)
    return each[torch.arange(LENGTH), STATES].prod(1)


def forward(data: Tensor, sigma: float) -> Tensor:
    """The closed form: each token of the data is masked on its own with probability sigma."""
    result = torch.zeros(len(STATES), dtype=torch.float64)
    for state, p in zip(STATES[CLEAN], data[CLEAN], strict=True):
        masked = STATES == MASK
        agrees = (masked | (state == STATES)).all(1)
        result += p * agrees * sigma ** masked.sum(1).double() * (1 - sigma) ** (~masked).sum(1).double()
    return result


def posterior_logits(data: Tensor) -> Tensor:
    """log p(x_0 of each token | the unmasked tokens) of every state, (64, L, V), by enumeration."""
    compatible = ((STATES[:, None] == MASK) | (STATES[:, None] == STATES[None])).all(2) * data  # (64, 64)
    one_hot = torch.nn.functional.one_hot(STATES, WORDS + 1).double()
    joint = torch.einsum("sx,xlv->slv", compatible, one_hot)
    return (joint / joint.sum(-1, keepdim=True)).log()


def transition(data: Tensor, level: Level, to: Level) -> Tensor:
    """(64, 64) probabilities from every state to every other, by the law's log_prob."""
    n = len(STATES)
    step = LAW.step(posterior_logits(data), STATES, level.expand(n), to.expand(n))
    return torch.stack([step.log_prob(state.expand(n, -1), "sum").exp() for state in STATES], 1)


def chain_error(data: Tensor, n: int, at: float = 0.5) -> float:
    """Total variation between the chain's law at a level, from all masks in steps of 1 / n, and the closed form."""
    schedule, law = flow_levels(n), forward(data, 1.0)
    for i in range(round(n * (1 - at))):
        law = law @ transition(data, schedule.level(i), schedule.target(i))
    return float((law - forward(data, at)).abs().sum() / 2)


def test_the_closed_form_is_a_law_and_starts_at_the_masks() -> None:
    for sigma in (0.0, 0.3, 1.0):
        assert forward(dependent(), sigma).sum() == pytest.approx(1, abs=1e-12)
    assert forward(dependent(), 1.0)[(STATES == MASK).all(1)] == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(forward(dependent(), 0.0), dependent())


@pytest.mark.parametrize(("level", "to"), [(1.0, 0.7), (0.5, 0.1), (0.2, 0.0)])
def test_probabilities_sum_to_one_and_reveal_at_the_right_rate(level: float, to: float) -> None:
    at, target = (Level(*(torch.tensor([v], dtype=torch.float64) for v in (1 - s, s, s))) for s in (level, to))
    matrix = transition(dependent(), at, target)
    torch.testing.assert_close(matrix.sum(1), torch.ones(64).double(), rtol=0, atol=1e-12)
    masks = (STATES == MASK).sum(1).double()
    torch.testing.assert_close(matrix @ masks, masks * to / level, rtol=0, atol=1e-12)


def test_a_known_word_gives_the_posterior_of_bayes() -> None:
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) of the forward process, one token at a time."""
    level, to, word = 0.8, 0.3, 2
    to_level = torch.eye(4, dtype=torch.float64) * (1 - level) / (1 - to)  # q(x_t | x_s), a row for each x_s
    to_level[:, MASK] += 1 - (1 - level) / (1 - to)
    to_level[MASK] = torch.eye(4)[MASK]
    at_to, at_level = torch.zeros(4).double(), torch.zeros(4).double()
    at_to[word], at_to[MASK] = 1 - to, to
    at_level[word], at_level[MASK] = 1 - level, level
    logits = torch.full((2, 1, 4), -torch.inf, dtype=torch.float64)
    logits[..., word] = 5.0
    tokens = torch.tensor([[MASK], [word]])
    levels = (Level(*(torch.full((2,), v, dtype=torch.float64) for v in (1 - s, s, s))) for s in (level, to))
    step = LAW.step(logits, tokens, *levels)
    for row, x in enumerate((MASK, word)):
        expected = to_level[:, x] * at_to / at_level[x]
        torch.testing.assert_close(step.log_probs[row, 0].exp(), expected, rtol=0, atol=1e-12)


def test_the_chain_has_the_closed_marginals() -> None:
    """Exactly for independent tokens; for dependent ones up to an error of order 1/N."""
    for n in (2, 4, 10):
        assert chain_error(independent(), n) < 1e-12
        assert chain_error(independent(), n, at=0.0) < 1e-12
    for at in (0.5, 0.0):
        few, many = chain_error(dependent(), 16, at), chain_error(dependent(), 32, at)
        print(f"total variation at sigma {at}: {few:.4f} in steps of 1/16, {many:.4f} of 1/32")
        assert few > 1e-3
        assert few / many == pytest.approx(2, abs=0.15)


def policy_and_reference() -> tuple[Categorical, Categorical, Tensor]:
    schedule, tokens = flow_levels(5), STATES
    steps = torch.arange(64) % 5
    at = (schedule.level(steps), schedule.target(steps))
    return LAW.step(draw(64, 3, 4), tokens, *at), LAW.step(draw(64, 3, 4, seed=1), tokens, *at), tokens


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1), ("mean", LENGTH)])
def test_kl_is_the_sum_over_all_outcomes_and_the_papers_closed_form(reduction: str, scale: int) -> None:
    policy, reference, tokens = policy_and_reference()
    enumerated = torch.zeros(64, dtype=torch.float64)
    for outcome in STATES:
        own, other = (c.log_prob(outcome.expand(64, -1), "sum") for c in (policy, reference))
        enumerated += torch.where(own > -torch.inf, own.exp() * (own - other), 0.0)
    kl = policy.kl(reference, reduction) * scale  # type: ignore[arg-type]
    torch.testing.assert_close(kl, enumerated, rtol=1e-12, atol=1e-12)
    # Only masked tokens that are revealed differ: (sigma_t - sigma_s) / sigma_t KL(p(x_0) || p_ref(x_0)) each.
    steps = torch.arange(64) % 5
    revealed = (0.2 / flow_levels(5).sigma[steps])[:, None] * (tokens == MASK)
    p, q = (TorchCategorical(logits=draw(64, 3, 4, seed=seed)[..., TOKENS]) for seed in (0, 1))
    closed = (revealed * torch.distributions.kl_divergence(p, q)).sum(1)
    torch.testing.assert_close(kl, closed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1), ("mean", LENGTH)])
def test_log_probs_equal_torch_distributions_and_ratios_subtract_them(reduction: str, scale: int) -> None:
    policy, reference, _ = policy_and_reference()
    tokens = reference.sample(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))
    expected = [TorchCategorical(logits=c.log_probs).log_prob(tokens).sum(1) for c in (policy, reference)]
    log_prob = policy.log_prob(tokens, reduction) * scale  # type: ignore[arg-type]
    torch.testing.assert_close(log_prob, expected[0], rtol=1e-12, atol=1e-12)
    ratio = policy.log_ratio(tokens, reference, reduction) * scale  # type: ignore[arg-type]
    torch.testing.assert_close(ratio, expected[0] - expected[1], rtol=1e-12, atol=1e-12)
    same = Categorical(policy.log_probs.clone())
    assert torch.equal(policy.log_ratio(tokens, same, "sum"), torch.zeros(64).double())


def test_what_cannot_happen_has_no_probability() -> None:
    policy, reference, tokens = policy_and_reference()
    remasked = tokens.clone()
    known = (tokens != MASK).any(1)
    remasked[tokens != MASK] = MASK
    assert (policy.log_prob(remasked, "sum")[known] == -torch.inf).all()
    narrower = Categorical(torch.where(torch.arange(4) == 3, -torch.inf, reference.log_probs))
    free = (tokens == MASK).any(1)
    assert (policy.kl(narrower, "sum")[free] == torch.inf).all()
    assert narrower.kl(reference, "sum").isfinite()[free].all()


def test_samples_have_the_probabilities() -> None:
    """100,000 uniforms in equal steps: the fraction of each token is its probability to within 1e-5."""
    logits = torch.tensor([[[0.3, 9.0, -1.2, 1.1]]], dtype=torch.float64)
    level, to = (Level(*(torch.tensor([v], dtype=torch.float64) for v in (1 - s, s, s))) for s in (0.8, 0.3))
    step = LAW.step(logits, torch.tensor([[MASK]]), level, to)
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = Categorical(step.log_probs.expand(1, n, 4)).sample(uniform[None])
    fractions = torch.bincount(tokens.flatten(), minlength=4).double() / n
    expected = 0.625 * logits[0, 0].masked_fill(torch.arange(4) == MASK, -torch.inf).softmax(0)
    expected[MASK] = 0.375
    torch.testing.assert_close(fractions, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_is_possible_for_any_uniform(dtype: torch.dtype) -> None:
    """The first and the last uniform below 1, where the first and last tokens have no probability."""
    log_probs = torch.tensor([-torch.inf, 0.1, 0.7, 0.1, 0.1 + 1e-9, -torch.inf]).to(dtype)
    log_probs[1:5] = log_probs[1:5].log()
    edge = torch.tensor([[0.0, 1 - torch.finfo(dtype).eps / 2]], dtype=dtype)
    assert Categorical(log_probs.expand(1, 2, 6)).sample(edge).tolist() == [[1, 4]]


def test_gradients_are_finite_and_right_where_tokens_are_impossible() -> None:
    schedule = flow_levels(5)
    steps = torch.arange(4)
    tokens = torch.tensor([[MASK, 0], [2, MASK], [3, 0], [MASK, MASK]])
    at = (schedule.level(steps), schedule.target(steps))
    reference = LAW.step(draw(4, 2, 4, seed=1), tokens, *at)
    chosen = reference.sample(torch.rand(4, 2, generator=torch.Generator().manual_seed(1)))

    def kl(logits: Tensor) -> Tensor:
        return LAW.step(logits, tokens, *at).kl(reference, "sum").sum()

    def ratio(logits: Tensor) -> Tensor:
        return LAW.step(logits, tokens, *at).log_ratio(chosen, reference, "sum").sum()

    logits = draw(4, 2, 4, seed=2).requires_grad_()
    for function in (kl, ratio):
        assert torch.autograd.gradcheck(function, (logits,))
        (gradient,) = torch.autograd.grad(function(logits), logits)
        assert not gradient[tokens != MASK].any()
        assert not gradient[..., MASK].any()


def test_a_word_that_is_ruled_out_leaves_the_gradient_of_the_kl_finite() -> None:
    schedule, tokens = flow_levels(5), torch.full((1, 2), MASK)
    at = (schedule.level(1), schedule.target(1))
    ruled_out = torch.where(torch.arange(4) == 3, -torch.inf, 0.0)
    reference = LAW.step(draw(1, 2, 4, seed=1) + ruled_out, tokens, *at)
    logits = draw(1, 2, 4).requires_grad_()
    kl = LAW.step(logits + ruled_out, tokens, *at).kl(reference, "sum")
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert kl.item() > 0
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((0, 1)) > 0).tolist() == [True, False, True, False]


def test_low_precision_is_raised_and_a_missing_mask_column_refused() -> None:
    schedule = flow_levels(5)
    tokens = torch.full((1, 2), MASK)
    step = LAW.step(draw(1, 2, 4).bfloat16(), tokens, schedule.level(1), schedule.target(1))
    assert step.log_probs.dtype == torch.float32
    with pytest.raises(ValueError, match=r"mask_id = 8 has no column in logits over 4 tokens: append columns"):
        MaskedDiffusion(8).step(draw(1, 2, 4), tokens, schedule.level(1), schedule.target(1))
