"""Gradient ascent in the noises that a chain starts from and injects: the loop that ReNO and DNO share.

With its noises given, a chain is a deterministic map G from them to a result. Each iteration climbs

    sum over prompts of  r(G(noises)) + weight x regulariser(noises)

by one step of an optimiser that works element by element, with the gradient clipped for each prompt: prompts share a
batch and nothing else, and each goes the way that it would go alone.

Every iteration's result joins those of the search, with the reward of its 8-bit pixels and without the regulariser. The
rounding lets gradients straight through, so that what is climbed is what is reported, and nothing is scored twice. The
last iteration is scored and not climbed from: I iterations take I forward passes and I - 1 backward ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffalign.noise import generator
from diffalign.search.base import Search
from diffalign.search.budget import Budget
from diffalign.search.config import DNOConfig, ReNOConfig
from diffalign.search.gaussianity import REGULARISERS
from diffalign.search.pool import Pool
from diffalign.search.space import GaussianSpace, Rows, Space


class NoiseAscent(Search):
    """Climbs the reward in the noises of each prompt's chain."""

    config: ReNOConfig | DNOConfig

    @abstractmethod
    def moved(self, noises: Tensor) -> int:
        """How many of a chain's noises (P, M, ...) are optimised, the first; the others stay as they were drawn."""

    @abstractmethod
    def optimizer(self, noises: Tensor) -> Optimizer:
        """The optimiser of these noises, which works element by element."""

    def check(self, space: Space) -> None:
        """Refuse what has no gradient."""
        if not isinstance(space, GaussianSpace):
            raise ValueError(f"{self.config.name} follows a gradient, and categorical steps have none: use a tree")
        if not space.differentiable:
            raise ValueError(f"{self.config.name} follows the gradient of the reward, which has none: use best_of_n")

    @torch.enable_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Climb once a round."""
        assert isinstance(space, GaussianSpace)
        if self.config.gradient_checkpointing == "block":
            space.checkpoint_blocks()
        drawn = noises(space)
        count = self.moved(drawn)
        free, fixed = drawn[:, :count].clone().requires_grad_(), drawn[:, count:]
        optimizer = self.optimizer(free)
        total, done = budget.chains(space), 0
        while (total is None or done < total) and budget.affords(space, 0, 0, 0):
            done += 1
            for part in space.micro_batches(space.num_prompts):
                with torch.set_grad_enabled(done != total):
                    self._climb(space, pool, torch.cat([free[part], fixed[part]], 1), part, done, count)
            if free.grad is not None:
                clip_rows(free.grad, self.config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            yield

    def _climb(self, space: GaussianSpace, pool: Pool, given: Tensor, part: slice, iteration: int, count: int) -> None:
        """Run the chains of one micro-batch, collect their results, and add to the gradient of its noises."""
        prompts = torch.arange(space.num_prompts)[part]
        results = follow(space, given, prompts, self.config.gradient_checkpointing == "step")
        rewards = space.rate(results, prompts)
        pool.add(results.detach(), rewards.detach(), prompts)
        objective = rewards[rewards.isfinite()].sum()
        if self.config.regulariser_weight:
            coins = generator(space.seed, "regulariser", iteration)  # the same for every micro-batch
            plausible = REGULARISERS[self.config.regulariser](given[:, :count], coins)
            objective = objective + self.config.regulariser_weight * plausible.sum().to(objective)
        if objective.requires_grad:  # not in the last iteration, nor where every score failed
            (-objective).backward()


def noises(space: GaussianSpace) -> Tensor:
    """The addressed noises of every prompt's sample 0: the first state's and those of the random steps, (P, M, ...)."""
    prompts, paths = torch.arange(space.num_prompts), [(0,)] * space.num_prompts
    steps = [step for step in range(space.num_steps) if space.stochastic[step]]
    first = space.noise("initial", prompts, paths, torch.zeros_like(prompts))
    return torch.stack([first, *(space.noise("step", prompts, paths, torch.full_like(prompts, s)) for s in steps)], 1)


def follow(space: GaussianSpace, given: Tensor, prompts: Tensor, recompute: bool) -> Tensor:
    """Take chains to their ends by given noises (B, M, ...), with a graph from these to the results (B, ...).

    Args:
        space: of the chains.
        given: as of `noises`.
        prompts: (B,) of the rows.
        recompute: store only the states, and evaluate the network again in the backward pass.
    """
    rows, injected = Rows(space.first(given[:, 0]), torch.zeros_like(prompts), prompts), 1
    for step in range(space.num_steps):
        if rows.x.requires_grad:
            space.count_backward(rows)
        transition = space.transition(rows, space.predict(rows, recompute=recompute))
        x = transition.mean
        if space.stochastic[step]:
            x, injected = transition.sample(given[:, injected]), injected + 1
        rows = Rows(x, rows.steps + 1, prompts)
    return rows.x


def clip_rows(gradient: Tensor, most: float) -> None:
    """Scale each row (B, ...) to a norm of at most `most`, in place; a row that is not finite becomes zero."""
    norms = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    gradient.mul_((most / norms).clamp(max=1)).masked_fill_(~norms.isfinite(), 0.0)
