r"""Particle Gibbs: sequential Monte Carlo again and again, each time beside a path kept from the time before.

With K particles, p the chain and r the reward, one sweep

1. runs K - 1 particles as `diffalign.search.smc` does with the potential diff, beside the kept path x*_{T:0}, which is
   compared with them and can be copied, but never loses its own place;
2. weighs all K by exp(lambda r(x_0)) and the weights of the run;
3. draws by these weights the path to keep, traced back through its ancestors.

The first sweep has no path to keep. A sweep leaves the target p(x_0) exp(lambda r(x_0)) invariant for any K > 1, so
averages over sweeps tend to the target as there are more of them: it can go on as long as there is a budget, with the
memory of K particles.

Sources: Andrieu, Doucet & Holenstein 2010, "Particle Markov chain Monte Carlo methods", for the algorithm; Dang et al.
2025, "Inference-time scaling of diffusion language models with particle Gibbs sampling" (arXiv 2507.08390), for its use
here. Departures:

- All particles of a sweep stay, with weights of sum 1, not only the path that is kept.
- The first `burn_in` sweeps are left out of the weights as soon as there are others; their results stay in the pool.
- Prediction and comparison of the kept path are kept too: a sweep after the first costs K - 1 chains.
- Resampling is adaptive, for the effective size does not depend on which particle was kept, and multinomial: systematic
  resampling beside a kept path takes another algorithm (Chopin & Singh 2015).
- log Z is -log mean 1 / Z_s over the sweeps that count, Z_s being the estimate of sweep s: beside a path from the
  target it is 1 / Z_s that is unbiased, for 1 / Z.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffalign.noise import generator
from diffalign.search.base import SEARCHES, Search
from diffalign.search.budget import Budget
from diffalign.search.config import GibbsConfig
from diffalign.search.particles import Swarm, guesses_of, log_evidence, look_ahead, multinomial
from diffalign.search.pool import Pool
from diffalign.search.smc import levels_of
from diffalign.search.space import Path, Rows, Space
from diffalign.search.weights import log_mean_exp, normalised


class Trail:
    """What R particles went through; those of a sweep (R = P K), or the kept path of each prompt (R = P).

    Attributes:
        states: before every step, and the results; (R, ...) each.
        outputs: of the network, at every step.
        values: lambda r_t (R,) at every step where particles were compared, else None.
        index: (R,) at every step, which row was copied to each place.
        rewards: (R,) of the results, NaN where they failed.
        leaves: (R,) of the results, their index in the pool; -1 where they failed.
    """

    rewards: Tensor
    leaves: Tensor

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.values: list[Tensor | None] = []
        self.index: list[Tensor] = []

    def back(self, rows: Tensor) -> Trail:
        """The paths that led to some of the results."""
        path = Trail()
        path.rewards, path.leaves = self.rewards[rows], self.leaves[rows]
        path.states.append(self.states[-1][rows])
        for step in reversed(range(len(self.index))):
            rows = self.index[step][rows]
            values = self.values[step]
            path.states.append(self.states[step][rows])
            path.outputs.append(self.outputs[step][rows])
            path.values.append(None if values is None else values[rows])
        for each in (path.states, path.outputs, path.values):
            each.reverse()
        return path


def _merge(kept: Tensor, own: Tensor) -> Tensor:
    """Rows (P K) of the kept path (P) and the others (P (K - 1)); of each prompt the kept one first."""
    return torch.cat([kept[:, None], own.unflatten(0, (len(kept), -1))], 1).flatten(0, 1)


def _rows(kept: Trail | None, x: Tensor, step: int, prompts: Tensor) -> Rows:
    """The rows of a sweep before a step: the kept path's, where there is one, and the others'."""
    return Rows(x if kept is None else _merge(kept.states[step], x), torch.full_like(prompts, step), prompts)


@SEARCHES.register("gibbs")
class Gibbs(Search):
    """Particle Gibbs: samples the target p(x_0) exp(lambda r(x_0)), the better the longer."""

    config_class = GibbsConfig
    config: GibbsConfig

    def check(self, space: Space) -> None:
        """Refuse chains in which copies of a particle stay equal."""
        levels_of(space, self.config.resample_levels)

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Sweep while the budget pays for another."""
        levels, nfe = levels_of(space, self.config.resample_levels), sum(space.evaluations)
        scores = 1 + len(levels) * guesses_of(space, self.config.guess_draws)
        size = min(filter(None, (self.config.num_particles, budget.chains(space, scores))))
        if size < 2:
            raise ValueError("the budget pays for one chain, and particle Gibbs takes two or more: raise it")
        sweeps: list[tuple[Tensor, Tensor, list[float | None]]] = []
        pool.weigh = lambda: self.weigh(sweeps, pool)
        kept, free = None, size
        while budget.affords(space, 0, free * nfe, free * scores):
            trail, log_weights = self._sweep(space, size, kept, len(sweeps), levels)
            self._score(space, pool, trail, kept)
            tilts = self.config.target_lambda * trail.rewards.reshape(log_weights.shape)
            log_z = [log_evidence(*each) for each in zip(log_weights, tilts, strict=True)]
            weights = (log_weights + tilts).masked_fill(tilts.isnan(), -torch.inf)
            kept, free = trail.back(self._draw(space, weights, len(sweeps))), size - 1
            sweeps.append((trail.leaves.reshape(weights.shape), weights, log_z))
            yield

    def _draw(self, space: Space, log_weights: Tensor, number: int) -> Tensor:
        """Draw a result of each prompt by weight: rows (P,)."""
        uniforms = [generator(space.seed, "keep", name, number).random(1) for name in space.ids]
        chosen = multinomial(log_weights, torch.tensor(np.array(uniforms)))[:, 0]
        return torch.arange(len(chosen)) * log_weights.shape[1] + chosen

    def _sweep(
        self, space: Space, size: int, kept: Trail | None, number: int, levels: list[int]
    ) -> tuple[Trail, Tensor]:
        """Take K particles of each prompt to the end of their chains, the kept path being the first of them.

        Returns:
            Where they were, and log weights (P, K), proper for the chain.
        """
        prompts = torch.arange(space.num_prompts).repeat_interleave(size)
        own = torch.arange(len(prompts)).reshape(-1, size)[:, 0 if kept is None else 1 :].flatten()
        paths: list[Path] = [(number, row % size) for row in own.tolist()]
        first = space.initial(prompts[own], paths)
        trail, swarm = Trail(), Swarm(_rows(kept, first.x, 0, prompts), space.num_prompts)
        for step in range(space.num_steps):
            rows = swarm.rows[own]
            output = space.predict(rows)
            values = self._compare(space, rows, output, paths) if step in levels else None
            if kept is not None:
                output, past = _merge(kept.outputs[step], output), kept.values[step]
                values = None if values is None or past is None else _merge(past, values)
            trail.states.append(swarm.rows.x)
            trail.outputs.append(output)
            trail.values.append(values)
            trail.index.append(self._copy(space, swarm, values, kept is not None, number))
            moved = space.advance(swarm.rows[own], output[trail.index[-1][own]], paths)
            swarm.rows = _rows(kept, moved.x, step + 1, prompts)
        trail.states.append(swarm.rows.x)
        return trail, swarm.log_weights

    def _compare(self, space: Space, rows: Rows, output: Tensor, paths: list[Path]) -> Tensor:
        return look_ahead(space, rows, output, paths, self.config.target_lambda, self.config.guess_draws)

    def _copy(self, space: Space, swarm: Swarm, values: Tensor | None, beside: bool, number: int) -> Tensor:
        """Resample the prompts whose weights are too uneven; which row stands in each place then, (P K,)."""
        wanted, step = torch.tensor([False]), int(swarm.rows.steps[0])
        if values is not None:
            wanted = swarm.twist(values) & swarm.uneven(self.config.ess_threshold)
        if not wanted.any():
            return torch.arange(len(swarm.rows))
        uniforms = [generator(space.seed, "resample", name, number, step).random(swarm.size) for name in space.ids]
        chosen = multinomial(swarm.log_weights + swarm.log_twist, torch.tensor(np.array(uniforms)))
        if beside:
            chosen[:, 0] = 0
        return swarm.copy(chosen, wanted)

    def _score(self, space: Space, pool: Pool, trail: Trail, kept: Trail | None) -> None:
        """Score the results that are new, and take them to the pool."""
        results = trail.states[-1].unflatten(0, (space.num_prompts, -1))[:, 0 if kept is None else 1 :]
        prompts = torch.arange(space.num_prompts).repeat_interleave(results.shape[1])
        results = results.flatten(0, 1)
        rewards = space.score(results, prompts)
        leaves = torch.tensor([-1 if leaf is None else leaf for leaf in pool.add(results, rewards, prompts)])
        trail.rewards = rewards if kept is None else _merge(kept.rewards, rewards)
        trail.leaves = leaves if kept is None else _merge(kept.leaves, leaves)

    def weigh(self, sweeps: list[tuple[Tensor, Tensor, list[float | None]]], pool: Pool) -> None:
        """Give every result the mean of its weights, of sum 1 in each sweep."""
        counted = sweeps[self.config.burn_in :] or sweeps
        for prompt in range(pool.space.num_prompts if counted else 0):
            total = torch.zeros(pool.count(prompt), dtype=torch.float64)
            for leaves, log_weights, _ in counted:
                valid = leaves[prompt] >= 0
                total.index_add_(0, leaves[prompt, valid], normalised(log_weights[prompt])[valid])
            pool.log_weights[prompt] = (total / len(counted)).log()
            estimates = [log_z[prompt] for *_, log_z in counted if log_z[prompt] is not None]
            pool.log_z[prompt] = -float(log_mean_exp(-torch.tensor(estimates))) if estimates else None
