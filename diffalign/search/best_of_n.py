"""Independent samples: the best of them, or all of them weighted.

The baselines that every other method has to beat at equal cost. With r the reward and p the law of the chain's result,

    best-of-N:               argmax_i r(x_i),                 x_1, ..., x_N ~ p
    importance resampling:   w_i = exp(lambda r(x_i)),        log Z = log mean_i w_i

the second being exact for the target p(x_0) exp(lambda r(x_0)) as N grows. Where r has a known maximum, `rejected`
keeps exact draws.

Samples are rolled out in waves, and each wave is decoded and scored before the next, so that memory does not grow with
N. Sample k of a prompt is that of `diffalign.rollout.rollout` with the address (prompt id, k).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffalign.noise import generator
from diffalign.search.base import SEARCHES, Search
from diffalign.search.budget import Budget
from diffalign.search.config import BestOfNConfig, ImportanceConfig
from diffalign.search.found import Found
from diffalign.search.pool import Pool
from diffalign.search.space import Rows, Space
from diffalign.search.weights import log_mean_exp


def roll_out(space: Space, rows: Rows, paths: list[tuple[int, ...]]) -> Tensor:
    """Take rows that stand at one step to the end of their chains, (B, ...)."""
    while int(rows.steps[0]) < space.num_steps:
        rows = space.advance(rows, space.predict(rows), paths)
    return rows.x


@SEARCHES.register("best_of_n")
class BestOfN(Search):
    """Keeps the best of independent samples."""

    config_class = BestOfNConfig
    config: BestOfNConfig | ImportanceConfig

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Sample wave after wave."""
        for first, count in budget.waves(space, self.config.wave):
            prompts = torch.arange(space.num_prompts).repeat_interleave(count)
            paths = [(first + k,) for _ in range(space.num_prompts) for k in range(count)]
            results = roll_out(space, space.initial(prompts, paths), paths)
            pool.add(results, space.score(results, prompts), prompts)
            yield


@SEARCHES.register("importance")
class Importance(BestOfN):
    """Weighs independent samples by exp(lambda r): self-normalised importance sampling, or soft best-of-N."""

    config_class = ImportanceConfig
    config: ImportanceConfig

    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """As best-of-N, with weights."""

        def weigh() -> None:
            for prompt in range(space.num_prompts):
                weights = self.config.target_lambda * pool.rewards(prompt)
                pool.log_weights[prompt] = weights
                pool.log_z[prompt] = float(log_mean_exp(weights)) if len(weights) else None

        pool.weigh = weigh
        yield from super().explore(space, budget, pool)


def rejected(found: Found, target_lambda: float, most: float, seed: int = 0) -> Tensor:
    """Indices of samples that are kept with probability exp(lambda (r - most)): exact draws from the target.

    Args:
        found: independent samples, of `BestOfN` or `Importance`.
        target_lambda: lambda of the target.
        most: an upper bound of the reward, such as 0 for a log-probability.
        seed: of the coins.

    Raises:
        ValueError: a reward is above the bound.
    """
    if found.best is not None and found.reward > most:
        raise ValueError(f"the reward {found.reward:g} is above its bound {most:g}: give a higher one")
    coins = torch.from_numpy(generator(seed, "rejection").random(len(found)))
    return (coins < (target_lambda * (found.rewards - most)).exp()).nonzero().flatten()
