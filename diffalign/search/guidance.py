r"""Gradient guidance: every step is pushed towards a higher reward of the clean sample that the network predicts.

With x_t = alpha x_0 + sigma noise, x0_hat(x_t) the predicted clean sample, r the reward, s the scale and varsigma^2 the
variance of the step's law, the step is shifted by

    dps:        mean of x_{t-1} += varsigma^2 g,    g = grad_{x_t} s r(x0_hat(x_t))
    lgd:        mean of x_{t-1} += varsigma^2 g,    g = grad_{x_t} log mean_j exp(s r(x0_hat(x_t) + r_t e_j))
    universal:  predicted noise -= sigma g,         g that of dps
    mpgd:       x0_hat += r_t^2 g,                  g = grad_{x0_hat} s r(x0_hat); the predicted noise stays

with e_j ~ N(0, I) and r_t = sigma / sqrt(alpha^2 + sigma^2), the spread of x_0 given x_t where data have unit variance.
The results are guided samples; the best is kept. They carry no weights: guidance alone does not sample
p(x_0) exp(s r(x_0)), whatever s is, as x0_hat stands for all that x_t may lead to. `diffalign.search.twisted` puts that
right with particles.

Sources: Chung et al. 2023, "Diffusion posterior sampling" (arXiv 2209.14687), algorithm 1, with the reward in the place
of the likelihood as in Jain et al. 2025 (DPS-RG of arXiv 2506.20701); Song et al. 2023, "Loss-guided diffusion models
for plug-and-play controllable generation" (ICML), LGD-MC; Bansal et al. 2023, "Universal guidance for diffusion models"
(arXiv 2302.07121), equation 6; He et al. 2024, "Manifold preserving guided diffusion" (arXiv 2311.16424), algorithm 1.
Departures:

- A step takes one forward and one backward pass of the denoiser, mpgd none backward: the gradient at x0_hat is taken
  first, for every e_j apart, and goes back through the denoiser once. Rows share a batch and nothing else.
- dps multiplies by the variance of the step, not by a constant over the size of the loss. For an ancestral law
  (eta = 1) this is the shift of universal, up to what shrinks with the steps; a law of less noise is pushed less. A law
  without noise has no variance, and there dps and lgd shift the predicted noise as universal does. A noisy law's steps
  without noise are not guided.
- A shift of the prediction is -sigma g of the noise and sigma^2 / alpha g of x0_hat; of a velocity -(sigma / alpha) g.
  At alpha = 0, where a flow starts, it does not exist and that step is not guided.
- mpgd's r_t^2 stands for the paper's free schedule c_t: where data are N(0, I), x0_hat goes as far as in universal.
- Universal guidance without its backward part and its repetitions, which are other methods.
- A guess whose score or gradient failed does not guide its row in that step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.laws import Normal
from diffalign.laws.prediction import per_row
from diffalign.search.base import SEARCHES, Search
from diffalign.search.budget import Budget
from diffalign.search.config import GuidanceConfig, NRGConfig
from diffalign.search.pool import Pool
from diffalign.search.space import GaussianSpace, Path, Rows, Space


@dataclass(eq=False)
class Slope:
    """What the network and the reward said of states.

    Attributes:
        output: (B, ...) of the network.
        value: (B,) float64 on the host, the log-potential, NaN where no guess has a score.
        gradient: (B, ...) of it; 0 where it failed.
    """

    output: Tensor
    value: Tensor
    gradient: Tensor

    def __getitem__(self, index: Tensor) -> Slope:
        return Slope(self.output[index], self.value[index], self.gradient[index])


class Guided(Search):
    """Samples with a shift in some steps; the best is kept. A subclass says which steps, and what the shift is."""

    config: GuidanceConfig | NRGConfig

    def check(self, space: Space) -> None:
        """Refuse chains that no gradient moves."""
        refuse_tokens(space, self.config.name)

    @abstractmethod
    def guided(self, space: GaussianSpace) -> list[int]:
        """The steps that are guided where the scale is not 0."""

    @abstractmethod
    def transition(self, space: GaussianSpace, rows: Rows, paths: Sequence[Path]) -> Normal:
        """The guided distribution of the next states, (B, ...); counts what it cost."""

    def scores(self) -> int:
        """Reward calls of a guided step of one row."""
        return 1

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Sample wave after wave."""
        assert isinstance(space, GaussianSpace)
        guided = self.guided(space) if self.config.scale else []
        for first, count in budget.waves(space, self.config.wave, 1 + self.scores() * len(guided)):
            prompts = torch.arange(space.num_prompts).repeat_interleave(count)
            paths = [(first + k,) for _ in range(space.num_prompts) for k in range(count)]
            rows = space.initial(prompts, paths)
            for step in range(space.num_steps):
                if step in guided:
                    transition = self.transition(space, rows, paths)
                else:
                    transition = space.transition(rows, space.predict(rows))
                rows = Rows(space.draw(transition, rows, paths), rows.steps + 1, prompts)
            pool.add(rows.x, space.score(rows.x, prompts), prompts)
            yield


@SEARCHES.register("guidance")
class Guidance(Guided):
    """DPS, LGD, universal guidance and MPGD."""

    config_class = GuidanceConfig
    config: GuidanceConfig

    def check(self, space: Space) -> None:
        """Refuse what has no gradient."""
        super().check(space)
        refuse_without_gradient(space, self.config.name)

    def scores(self) -> int:
        """Reward calls of a guided step of one row."""
        return self.config.draws if self.config.kind == "lgd" else 1

    def _by_variance(self, space: GaussianSpace) -> bool:
        return self.config.kind in ("dps", "lgd") and any(space.stochastic)

    def guided(self, space: GaussianSpace) -> list[int]:
        """All steps but those that have no variance, or no signal, to scale the shift by."""
        if self._by_variance(space):
            return [step for step in range(space.num_steps) if space.stochastic[step]]
        return list(range(space.num_steps)) if self.config.kind == "mpgd" else steps_with_signal(space)

    def transition(self, space: GaussianSpace, rows: Rows, paths: Sequence[Path]) -> Normal:
        """The law's Gaussian of each row, shifted."""
        draws = self.config.draws if self.config.kind == "lgd" else 0
        slope = slope_at(space, rows, paths, self.config.scale, draws, through=self.config.kind != "mpgd")
        if self.config.kind == "mpgd":
            return space.transition(*with_guess(space, rows, slope.output, slope.gradient))
        if self._by_variance(space):
            return shifted(space.transition(rows, slope.output), slope.gradient)
        return space.transition(rows, with_score(space, rows, slope.output, slope.gradient))


def refuse_tokens(space: Space, name: str) -> None:
    """Raise ValueError for a chain of tokens."""
    if not isinstance(space, GaussianSpace):
        raise ValueError(f"{name} follows a gradient, and categorical steps have none: use smc or a tree")


def refuse_without_gradient(space: Space, name: str) -> None:
    """Raise ValueError for a reward that says it has no gradient."""
    if not space.differentiable:
        raise ValueError(f"{name} follows the gradient of the reward, which has none: use smc or a tree")


def slope_at(
    space: GaussianSpace, rows: Rows, paths: Sequence[Path], scale: float, draws: int = 0, through: bool = True
) -> Slope:
    """Evaluate network and reward at states, and differentiate, in micro-batches.

    Args:
        space: of the states.
        rows: B states.
        paths: of the states, addresses of the noise of draws.
        scale: of the reward, whose log-potential is scale r(x0_hat).
        draws: noised guesses e_j, of which log mean exp is taken; 0: the guess itself.
        through: differentiate by the state, through the denoiser; else by the guess.
    """
    found = []
    for part in space.micro_batches(len(rows)):
        few = rows[part]
        with torch.set_grad_enabled(through):
            x = few.x.detach().requires_grad_(through)
            few = Rows(x, few.steps, few.prompts)
            output = space.predict(few)
            guess = space.prediction(few, output).x0
        value, gradient = _slope_at_guess(space, guess.detach(), few, paths[part], scale, draws)
        if through:
            space.count_backward(few)
            (gradient,) = torch.autograd.grad(guess, x, gradient)
        found.append((output.detach(), value, finite_rows(gradient)))
    return Slope(*(torch.cat(each) for each in zip(*found, strict=True)))


def _slope_at_guess(
    space: GaussianSpace, guess: Tensor, rows: Rows, paths: Sequence[Path], scale: float, draws: int
) -> tuple[Tensor, Tensor]:
    """The log-potential (B,) of a guess (B, ...) and its gradient there; the graph of one draw at a time is kept."""
    spread = _spread(space, rows, guess)
    values, gradients = [], []
    for k in range(max(draws, 1)):
        drawn = spread * space.noise(f"guess {k}", rows.prompts, paths, rows.steps) if draws else 0.0
        with torch.enable_grad():
            leaf = (guess + drawn).requires_grad_()
            value = space.rate_guesses(leaf, rows.prompts)
        gradients.append(scale * gradient_of(value, leaf))
        values.append(scale * value.detach().double().cpu())
    each = torch.stack(values)
    valid = each.isfinite()
    known = each.masked_fill(~valid, -torch.inf)
    share = known.softmax(0).nan_to_num(0.0)  # all failed
    gradient = sum(per_row(s.to(guess.device), guess) * g for s, g in zip(share, gradients, strict=True))
    return known.logsumexp(0) - valid.sum(0).log(), gradient  # type: ignore[return-value]


def gradient_of(values: Tensor, x: Tensor) -> Tensor:
    """The gradient (B, ...) of values (B,), each by its own row of x; 0 where the value, or the gradient, failed.

    Raises:
        ValueError: there are values, and they carry no gradient.
    """
    known = values.isfinite()
    if values.requires_grad:
        return finite_rows(torch.autograd.grad(values, x, known.to(values))[0])
    if known.any():
        raise ValueError(
            "the reward's scores carry no gradient: declare it differentiable=False, and use smc or a tree"
        )
    return torch.zeros_like(x)


def finite_rows(gradient: Tensor) -> Tensor:
    """Gradients (B, ...) with 0 in the place of rows that are not finite."""
    failed = ~gradient.flatten(1).isfinite().all(1)
    return gradient.masked_fill(failed.view(-1, *[1] * (gradient.ndim - 1)), 0.0)


def shifted(law: Normal, gradient: Tensor) -> Normal:
    """The Gaussian with its variance times a gradient (B, ...) added to the mean."""
    return Normal(law.mean + per_row(law.std.square(), law.mean) * gradient, law.std)


def steps_with_signal(space: GaussianSpace) -> list[int]:
    """Steps from states that are not pure noise: alpha above 0."""
    return [step for step in range(space.num_steps) if space.schedule.alpha[step] > 0]


def with_score(space: GaussianSpace, rows: Rows, output: Tensor, gradient: Tensor) -> Tensor:
    r"""The network's output (B, ...), were the score larger by `gradient` (B, ...): the prediction that it would be.

    By score = -noise / sigma, and x_t = alpha x_0 + sigma noise with x_t as it is:

    .. math::
        \hat\epsilon \mathrel{-}= \sigma g, \qquad \hat x_0 \mathrel{+}= \frac{\sigma^2}{\alpha} g, \qquad
        \alpha \hat\epsilon - \sigma \hat x_0,\; \hat\epsilon - \hat x_0 \mathrel{-}= \frac{\sigma}{\alpha} g
    """
    level = space.schedule.level(rows.steps, space.device)
    factor = {
        "epsilon": -level.sigma,
        "sample": level.sigma.square() / level.alpha,
        "v_prediction": -level.sigma / level.alpha,
        "velocity": -level.sigma / level.alpha,
    }[space.kind]
    return output + per_row(factor, gradient) * gradient


def with_guess(space: GaussianSpace, rows: Rows, output: Tensor, gradient: Tensor) -> tuple[Rows, Tensor]:
    """States and outputs whose x0_hat is larger by r_t^2 times a gradient (B, ...), and whose noise is the same."""
    level = space.schedule.level(rows.steps, space.device)
    move = _spread(space, rows, gradient).square() * gradient
    factor = {
        "epsilon": torch.zeros_like(level.sigma),
        "sample": torch.ones_like(level.sigma),
        "v_prediction": -level.sigma,
        "velocity": -torch.ones_like(level.sigma),
    }[space.kind]
    x = rows.x + per_row(level.alpha, move) * move
    return Rows(x, rows.steps, rows.prompts), output + per_row(factor, move) * move


def _spread(space: GaussianSpace, rows: Rows, like: Tensor) -> Tensor:
    """r_t of each row, to multiply rows of `like`."""
    level = space.schedule.level(rows.steps, space.device)
    return per_row(level.sigma / (level.alpha.square() + level.sigma.square()).sqrt(), like)
