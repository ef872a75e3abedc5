r"""Twisted particles: SMC that proposes along the gradient of the reward, with weights that put the push right.

With p the chain, varsigma^2 the variance of its step, r the reward and x0_hat the predicted clean sample, particles
x_t have the twist

    psi_t(x_t) = exp(gamma_t lambda r(x0_hat(x_t))),    0 <= gamma_T <= ... <= gamma_0 = 1,

and go on, from noise to result, by

1. x_{t-1} ~ q = N(mu_p + varsigma^2 grad_{x_t} gamma_{t-1} lambda r(x0_hat(x_t)), varsigma^2),
2. w *= p(x_{t-1} | x_t) psi_{t-1}(x_{t-1}) / (q(x_{t-1} | x_t) psi_t(x_t)),
3. resampling by w where its effective size is below a share of K,

with psi_0 = exp(lambda r(x_0)) at the end, so that weighted results sample p(x_0) exp(lambda r(x_0)), and the mean
weight is an unbiased estimate of Z, for any twist. TDS has gamma = 1 all along. DAS raises it: by the schedule
min((1 + gamma)^i - 1, 1) of its step i, or as far as the effective size stays at the share of K.

psi reads x_t as the forward process made it. A chain that keeps something of its first noise (a flow SDE of a below
sqrt(2)) leads elsewhere from there, and its weights are less even: on a ring of modes at 100 steps, with the exact
log E[exp(r(x_0)) | x_t] in the place of r(x0_hat), their effective size is 0.87 K for ancestral steps and 0.38 K at
a = 0.7. And where guesses mislead, as they do on that ring, few particles carry most of the weight: log Z is usually
too low, in TDS by more than in SMC without gradients.

Sources: Wu et al. 2023, "Practical and asymptotically exact conditional sampling in diffusion models" (TDS, arXiv
2306.17775), algorithm 1; Kim et al. 2025, "Test-time alignment of diffusion models without reward over-optimization"
(DAS, arXiv 2501.05803). Departures:

- A level takes one forward and one backward pass of the denoiser, which serve twist, next proposal and next step alike.
- w is kept apart from psi, as `diffalign.search.particles` tells; all arithmetic is in the log domain.
- Resampling is systematic in both, at every level with a random step to come. DAS uses SSP resampling.
- Adaptive tempering is by bisection; DAS descends a gradient. gamma may pass over several schedule steps at once, and
  stays where the effective size is below the share already.
- i of the schedule counts hundredths of the chain, where DAS counts steps: so gamma means the same in any number.
- All weighted particles are results; DAS returns the one of the largest weight, which is neither a draw nor the best.
- A guess whose score failed counts as the mean of its prompt's others, and its particle is not pushed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.laws.prediction import per_row
from diffalign.search.base import SEARCHES
from diffalign.search.config import DASConfig, TDSConfig
from diffalign.search.guidance import Slope, refuse_tokens, refuse_without_gradient, shifted, slope_at
from diffalign.search.particles import Swarm, look_ahead, with_neutral
from diffalign.search.smc import SMC
from diffalign.search.space import GaussianSpace, Path, Rows, Space
from diffalign.search.weights import effective_size


class Twisted(SMC):
    """What TDS and DAS share: all but gamma."""

    config: TDSConfig | DASConfig

    def check(self, space: Space) -> None:
        """Refuse what has no gradient, and chains without noise."""
        refuse_tokens(space, self.config.name)
        refuse_without_gradient(space, self.config.name)
        if not any(space.stochastic):
            raise ValueError(
                f"no step of the chain is random, so {self.config.name} has no density to weigh a push by: use a "
                "stochastic law (eta above 0), or guidance, which sets no weights"
            )

    @abstractmethod
    def temper(
        self, swarm: Swarm, values: Tensor, gamma: Tensor, share: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """Gamma of the twist at a level, and of the proposal from it, both (P,).

        Args:
            swarm: particles with the weights that they came with.
            values: (P, K) lambda r(x0_hat), NaN where it failed.
            gamma: (P,) of the twist at the last level.
            share: of the chain that is done at this level.
            following: that is done at the next.
        """

    def run_once(self, space: Space, size: int, number: int, levels: list[int]) -> Swarm:
        """Take K particles of each prompt to the end of their chains; those of a run are samples number * K onwards."""
        assert isinstance(space, GaussianSpace)
        prompts = torch.arange(space.num_prompts).repeat_interleave(size)
        paths: list[Path] = [(number * size + k,) for _ in range(space.num_prompts) for k in range(size)]
        swarm = Swarm(space.initial(prompts, paths), space.num_prompts)
        gamma = torch.zeros(space.num_prompts, dtype=torch.float64)
        for step in range(space.num_steps):
            if step not in levels:  # nothing random follows
                swarm.rows = space.advance(swarm.rows, space.predict(swarm.rows), paths)
                continue
            slope = self._slope(space, swarm.rows, paths, step)
            values, steps = slope.value.reshape(-1, size), space.num_steps
            gamma, push = self.temper(swarm, values, gamma, step / steps, (step + 1) / steps)
            wanted = swarm.twist((gamma[:, None] * values).flatten()) & swarm.uneven(self.config.ess_threshold)
            if wanted.any():
                slope = slope[swarm.copy(self._choose(space, swarm, number, step), wanted)]
            swarm.rows, log_ratio = _propose(space, swarm.rows, slope, push.repeat_interleave(size), paths)
            swarm.log_weights = swarm.log_weights + log_ratio.reshape(values.shape)
        return swarm

    def _slope(self, space: GaussianSpace, rows: Rows, paths: list[Path], step: int) -> Slope:
        """Network, lambda r(x0_hat) and its gradient at states; the gradient is 0 before a step without noise."""
        if space.stochastic[step]:
            return slope_at(space, rows, paths, self.config.target_lambda)
        output = space.predict(rows)
        value = look_ahead(space, rows, output, paths, self.config.target_lambda, 1)
        return Slope(output, value, torch.zeros_like(rows.x))


def _propose(
    space: GaussianSpace, rows: Rows, slope: Slope, push: Tensor, paths: Sequence[Path]
) -> tuple[Rows, Tensor]:
    """Draw the next states from the chain's Gaussian pushed by `push` (B,) times the gradient.

    Returns:
        The next states, and log p - log q of each, (B,) in float64 on the host.
    """
    law = space.transition(rows, slope.output)
    if not space.stochastic[int(rows.steps[0])]:
        return Rows(law.mean, rows.steps + 1, rows.prompts), torch.zeros(len(rows), dtype=torch.float64)
    pushed = shifted(law, per_row(push.to(law.mean), law.mean) * slope.gradient)
    x = space.draw(pushed, rows, paths)
    log_ratio = law.log_ratio(x, pushed, "sum", validate=False).double().cpu()
    return Rows(x, rows.steps + 1, rows.prompts), log_ratio


@SEARCHES.register("tds")
class TDS(Twisted):
    """The twisted diffusion sampler: samples the target p(x_0) exp(lambda r(x_0))."""

    config_class = TDSConfig
    config: TDSConfig

    def temper(
        self, swarm: Swarm, values: Tensor, gamma: Tensor, share: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """1 and 1."""
        return torch.ones_like(gamma), torch.ones_like(gamma)


@SEARCHES.register("das")
class DAS(Twisted):
    """TDS with a reward that grows on the way."""

    config_class = DASConfig
    config: DASConfig

    def temper(
        self, swarm: Swarm, values: Tensor, gamma: Tensor, share: float, following: float
    ) -> tuple[Tensor, Tensor]:
        """By the schedule, at this level and the next; or by the effective size, for both."""
        if self.config.tempering == "schedule":
            return torch.full_like(gamma, self._scheduled(share)), torch.full_like(gamma, self._scheduled(following))
        gamma = raised(swarm.log_weights, with_neutral(values).nan_to_num(0.0), gamma, self.config.ess_threshold)
        return gamma, gamma

    def _scheduled(self, share: float) -> float:
        return min((1 + self.config.gamma) ** (100 * share) - 1, 1.0)


def raised(log_weights: Tensor, values: Tensor, gamma: Tensor, share: float) -> Tensor:
    """Gamma raised towards 1 as far as the effective size of w exp(gamma values) stays at a share of K, (P,) float64.

    Args:
        log_weights: (P, K).
        values: (P, K), finite.
        gamma: (P,) so far; it stays where the effective size is below the share already.
        share: of K.
    """

    def enough(at: Tensor) -> Tensor:
        return effective_size(log_weights + at[:, None] * values) >= share * values.shape[1]

    low, high = gamma, torch.ones_like(gamma)
    low = torch.where(enough(high), high, low)
    settled = (low == high) | ~enough(low)
    for _ in range(40):  # to 1e-12
        middle = (low + high) / 2
        reached = enough(middle) & ~settled
        low, high = torch.where(reached, middle, low), torch.where(reached | settled, high, middle)
    return low
