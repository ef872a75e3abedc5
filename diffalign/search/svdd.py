r"""SVDD: at every step several children are drawn, and one goes on, chosen by the reward that it may lead to.

With p the chain, r the reward and v(x) = r(x0_hat(x)) the reward of the clean sample predicted from x, for each sample

1. M children are drawn from p(x_{t-1} | x_t);
2. the network is evaluated at each, for its value v and for the next step alike;
3. one goes on, drawn from softmax(lambda v), or that of the highest v.

With `block` = B > 1 children run B steps between choices (CoDe).

Sources: Li et al. 2024, "Derivative-free guidance in continuous and discrete diffusion models with soft value-based
decoding" (SVDD-PM, arXiv 2408.08252); Singh et al. 2025, "CoDe: blockwise control for denoising diffusion models"
(arXiv 2502.00968). Departures:

- What was evaluated at the child that goes on is not evaluated again: N steps cost M (N - 1) + 1 evaluations.
- The last M children are all results.
- Children are drawn, as in the paper; the authors' code takes the highest. With each draw the sample's weight is
  multiplied by mean_m exp(lambda v_m) / exp(lambda v) of the child, and at its end by exp(lambda r) / M: so weighted,
  results sample the target p(x_0) exp(lambda r(x_0)), which without weights they do not. The highest child has no such
  weight: that search is for the best only.
- Of a discrete chain v is 1/lambda log mean exp(lambda r) over draws of x_0.
- A child whose score failed counts as the mean of its siblings, and is never the highest.
- Steps without noise, whose children would be equal, belong to the block before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffalign.noise import generator
from diffalign.search.base import SEARCHES, Search
from diffalign.search.budget import Budget
from diffalign.search.config import SVDDConfig
from diffalign.search.particles import Harvest, guesses_of, look_ahead, multinomial, with_neutral
from diffalign.search.pool import Pool
from diffalign.search.space import Path, Rows, Space
from diffalign.search.weights import log_mean_exp


@SEARCHES.register("svdd")
class SVDD(Search):
    """Chooses among children by predicted reward; `block` above 1 is CoDe."""

    config_class = SVDDConfig
    config: SVDDConfig

    def check(self, space: Space) -> None:
        """Refuse blocks with nothing random in them: their children would be equal."""
        start = 0
        for mark in self.marks(space):
            if not any(space.stochastic[start:mark]):
                raise ValueError(
                    f"no step from {start} to {mark} is random, so children there are equal: use a stochastic law (eta "
                    f"above 0), or blocks longer than {self.config.block}"
                )
            start = mark

    def marks(self, space: Space) -> list[int]:
        """The steps before which one child is chosen; the last is the end of the chain."""
        marks = list(range(self.config.block, space.num_steps, self.config.block))
        while marks and not any(space.stochastic[marks[-1] :]):
            marks.pop()
        return [*marks, space.num_steps]

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Run wave after wave of samples."""
        children, guesses = self.config.num_children, guesses_of(space, self.config.guess_draws)
        scores = children * (1 + guesses * (len(self.marks(space)) - 1))
        nfe = space.evaluations[0] + children * sum(space.evaluations[1:])
        harvest = Harvest(pool, self.config.target_lambda)
        if self.config.choice == "highest":
            pool.weigh = lambda: None  # the weights are no use
        for first, count in budget.waves(space, self.config.wave, scores, nfe):
            rows, log_weights = self._wave(space, count, first)
            numbers = (first + torch.arange(count)).repeat_interleave(children).repeat(space.num_prompts, 1)
            harvest.add(rows, log_weights.repeat_interleave(children).reshape(numbers.shape), numbers)
            yield

    def _wave(self, space: Space, count: int, first: int) -> tuple[Rows, Tensor]:
        """Samples `first` onwards of each prompt.

        Returns:
            The last children (P count M), and the log weights of their parents (P count,), proper for the chain.
        """
        children = self.config.num_children
        prompts = torch.arange(space.num_prompts).repeat_interleave(count)
        numbers = (first + torch.arange(count)).repeat(space.num_prompts).tolist()
        rows = space.initial(prompts, [(number,) for number in numbers])
        output, log_weights = space.predict(rows), torch.zeros(len(rows), dtype=torch.float64)
        paths: list[Path] = [(number, child) for number in numbers for child in range(children)]
        for mark in self.marks(space):
            many = torch.arange(len(rows)).repeat_interleave(children)
            family, outputs = rows[many], output[many]
            while True:
                family = space.advance(family, outputs, paths)
                if int(family.steps[0]) == space.num_steps:
                    return family, log_weights
                outputs = space.predict(family)
                if int(family.steps[0]) == mark:
                    break
            values = look_ahead(space, family, outputs, paths, self.config.target_lambda, self.config.guess_draws)
            chosen, gain = self._choose(space, values.reshape(-1, children), prompts, numbers, mark)
            log_weights = log_weights + gain
            index = torch.arange(len(rows)) * children + chosen
            rows, output = family[index], outputs[index]
        raise AssertionError("the last mark is the end of the chain")

    def _choose(
        self, space: Space, values: Tensor, prompts: Tensor, numbers: list[int], mark: int
    ) -> tuple[Tensor, Tensor]:
        """Which child goes on, (B,), given lambda v (B, M), and the log of what its weight is multiplied by, (B,)."""
        if self.config.choice == "highest":
            return values.masked_fill(values.isnan(), -math.inf).argmax(1), torch.zeros(len(values)).double()
        values = with_neutral(values).nan_to_num(0.0)  # all failed: any
        uniforms = [
            generator(space.seed, "child", space.ids[p], number, mark).random(1)
            for p, number in zip(prompts.tolist(), numbers, strict=True)
        ]
        chosen = multinomial(values, torch.tensor(np.array(uniforms)))
        return chosen[:, 0], log_mean_exp(values) - values.gather(1, chosen)[:, 0]
