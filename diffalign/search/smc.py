r"""Sequential Monte Carlo: K samples run side by side, and the promising ones take the places of the others.

With p the chain, r the reward, x0_hat(x_t) the clean sample predicted from x_t and r_t = r(x0_hat(x_t)), the
Feynman-Kac potentials are

    diff: G_t = exp(lambda (r_t - r_{t+1})),    max: G_t = exp(lambda max_{s >= t} r_s),
    add:  G_t = exp(lambda sum_{s >= t} r_s),   rt:  G_t = exp(lambda r_t),

and G_0 = exp(lambda r(x_0)) / prod_{t > 0} G_t, so that particles weighted by the product of all sample
p(x_0) exp(lambda r(x_0)). From noise to result, at every level:

1. the network is evaluated at x_t, for the guess x0_hat and for the next step alike;
2. weights are multiplied by G_t, and where their effective size is below a share of K, K particles are drawn by them;
3. the chain takes its step, or a proposal q does, and weights are multiplied by p / q.

Source: Singhal et al. 2025, "A general framework for inference-time scaling and steering of diffusion models"
(Feynman-Kac steering, arXiv 2501.06848). Departures:

- What was not resampled keeps its weight. All arithmetic is in the log domain, and resampling is systematic.
- The correction by G_0 is by r of the result, also for max, where the authors' code uses the maximum over the path, a
  target of its own. max, add and rt resample by powers of the tilt, so their last weights are very uneven: they suit a
  search for the best.
- max begins without a past, not with a reward of 0.
- Of a discrete chain r_t is 1/lambda log mean exp(lambda r) over draws of x_0.
- A guess whose score failed counts as the mean of its prompt's others, and a level where all failed is passed over;
  the target stays the same.
- Of independent runs all weighted particles are kept, which pools the runs by their estimates of Z.

log Z is unbiased for Z, not for log Z: where the guesses mislead, few particles carry most of the weight, and its usual
value is too low.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffalign.noise import generator
from diffalign.search.base import SEARCHES, Search
from diffalign.search.budget import Budget
from diffalign.search.config import SMCConfig
from diffalign.search.particles import Harvest, Swarm, guesses_of, look_ahead
from diffalign.search.pool import Pool
from diffalign.search.space import Path, Rows, Space
from diffalign.search.weights import systematic


def levels_of(space: Space, shares: list[float] | None) -> list[int]:
    """The steps before which particles are compared; those after which nothing is random are left out.

    Raises:
        ValueError: none is left, so that copies of a particle would stay equal.
    """
    every = range(space.num_steps)
    steps = every if shares is None else sorted({round(share * space.num_steps) for share in shares})
    levels = [step for step in steps if any(space.stochastic[step:])]
    if not levels and len(steps):
        raise ValueError(
            f"no step after those of resample_levels = {shares} is random, so copies of a particle stay equal: use a "
            "stochastic law (eta above 0), or earlier levels"
        )
    return levels


@SEARCHES.register("smc")
class SMC(Search):
    """Feynman-Kac steering: samples the target p(x_0) exp(lambda r(x_0)).

    A subclass proposes otherwise by `look` and `propose`.
    """

    config_class = SMCConfig
    config: SMCConfig

    def check(self, space: Space) -> None:
        """Refuse chains in which copies of a particle stay equal."""
        levels_of(space, self.config.resample_levels)

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Run K particles from noise to result, again and again while the budget pays for K more."""
        levels = levels_of(space, self.config.resample_levels)
        total = budget.chains(space, 1 + len(levels) * guesses_of(space, self.config.guess_draws))
        size = min(filter(None, (self.config.num_particles, total)), default=None)
        if size is None:
            raise ValueError("a budget of seconds does not say how many particles there are: give num_particles")
        harvest = Harvest(pool, self.config.target_lambda)
        while (total is None or (len(harvest) + 1) * size <= total) and budget.affords(space, 0, 0, 0):
            number = len(harvest)
            swarm = self.run_once(space, size, number, levels)
            harvest.add(swarm.rows, swarm.log_weights, swarm.ancestors + number * size)
            yield

    def run_once(self, space: Space, size: int, number: int, levels: list[int]) -> Swarm:
        """Take K particles of each prompt to the end of their chains; those of a run are samples number * K onwards."""
        prompts = torch.arange(space.num_prompts).repeat_interleave(size)
        paths: list[Path] = [(number * size + k,) for _ in range(space.num_prompts) for k in range(size)]
        swarm = Swarm(space.initial(prompts, paths), space.num_prompts, self.config.potential)
        for step in range(space.num_steps):
            output, values = self.look(space, swarm.rows, paths, step in levels)
            if values is not None:
                wanted = swarm.twist(values) & swarm.uneven(self.config.ess_threshold)
                if wanted.any():
                    output = output[swarm.copy(self._choose(space, swarm, number, step), wanted)]
            swarm.rows, log_ratio = self.propose(space, swarm.rows, output, paths)
            swarm.log_weights = swarm.log_weights + log_ratio.reshape(swarm.log_weights.shape)
        return swarm

    def _choose(self, space: Space, swarm: Swarm, number: int, step: int) -> Tensor:
        """Who is copied, (P, K)."""
        log_weights = swarm.log_weights + swarm.log_twist
        uniforms = [generator(space.seed, "resample", name, number, step).random() for name in space.ids]
        return torch.stack([systematic(w, swarm.size, u) for w, u in zip(log_weights, uniforms, strict=True)])

    def look(self, space: Space, rows: Rows, paths: list[Path], compare: bool) -> tuple[Tensor, Tensor | None]:
        """Evaluate the network at states.

        Args:
            space: of the states.
            rows: B states at one step.
            paths: of the states.
            compare: whether particles are compared here.

        Returns:
            What `propose` needs of each state, (B, ...), here the network's output; and, where particles are compared,
            lambda r_t (B,) in float64 on the host, NaN where it failed.
        """
        output = space.predict(rows)
        if not compare:
            return output, None
        return output, look_ahead(space, rows, output, paths, self.config.target_lambda, self.config.guess_draws)

    def propose(self, space: Space, rows: Rows, output: Tensor, paths: list[Path]) -> tuple[Rows, Tensor]:
        """Draw the next states from a law q.

        Args:
            space: of the states.
            rows: B states at one step.
            output: what `look` gave for each.
            paths: addresses of their noise.

        Returns:
            The next states, and log p - log q of each, (B,) in float64 on the host: here q is the chain, and it is 0.
        """
        return space.advance(rows, output, paths), torch.zeros(len(rows), dtype=torch.float64)
