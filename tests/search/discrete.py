"""A masked chain over three tokens of four words whose every state and path can be enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.laws import Level, MaskedDiffusion, flow_schedule
from diffalign.search.masked import MaskedSpace
from diffalign.search.space import Path, Rows
from tests.search.problems import hashed_uniform

WORDS, LENGTH = 4, 3
MASK = WORDS
STATES = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=LENGTH)))
CLEAN = (STATES != MASK).all(1)
_BASE = (WORDS + 1) ** torch.arange(LENGTH - 1, -1, -1)


def index(x: Tensor) -> Tensor:
    """Rows of STATES that tokens (..., L) are."""
    return (x * _BASE).sum(-1)


class Enumerable(MaskedSpace):
    """Six steps; the data and the reward are drawn once, the reward from N(0, 4), so that few sequences carry exp(r).

    Attributes:
        prior: (S,) the law of the chain's result over STATES, by multiplying the matrices of its steps.
        target: (S,) prior exp(r) / Z.
        log_z: log Z.
    """

    def __init__(self, seeds: Sequence[int] = (0,), steps: int = 6, micro_batch_size: int | None = None) -> None:
        drawn = torch.randn(2, len(STATES), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        data = torch.where(CLEAN, drawn[0].exp(), 0.0)
        self.table = torch.where(CLEAN, 2 * drawn[1], 0.0)
        compatible = ((STATES[:, None] == MASK) | (STATES[:, None] == STATES[None])).all(2) * data
        joint = torch.einsum("sx,xlv->slv", compatible, torch.nn.functional.one_hot(STATES, WORDS + 1).double())
        self.logits = (joint / joint.sum(-1, keepdim=True)).log()
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        super().__init__(
            self._network,
            self._reward,
            MaskedDiffusion(MASK),
            flow_schedule(sigmas, sigmas[:-1]),
            LENGTH,
            ids=list(seeds),
            micro_batch_size=micro_batch_size,
        )
        self.steps = [self._matrix(step) for step in range(steps)]
        self.prior = torch.linalg.multi_dot([*self.steps, torch.eye(len(STATES), dtype=torch.float64)])[-1]
        weight = self.prior * self.table.exp()
        self.target, self.log_z = weight / weight.sum(), float(weight.sum().log())

    def _uniform(self, purpose: str, rows: Rows, paths: Sequence[Path]) -> Tensor:
        addresses = [
            (self.seed, purpose, self.ids[p], *path) for p, path in zip(rows.prompts.tolist(), paths, strict=True)
        ]
        return hashed_uniform(addresses, rows.steps, LENGTH)

    def _network(self, x: Tensor, level: Level, prompts: Tensor) -> Tensor:
        return self.logits[index(x)]

    def _reward(self, x: Tensor, prompts: Tensor) -> Tensor:
        return self.table[index(x)]

    def _matrix(self, step: int) -> Tensor:
        """(S, S) probabilities from every state to every other at a step."""
        rows = Rows(STATES, torch.full((len(STATES),), step), torch.zeros(len(STATES), dtype=torch.long))
        transition = self.transition(rows, self.logits)
        return torch.stack([transition.log_prob(state.expand_as(STATES), "sum").exp() for state in STATES], 1)

    def soft_value(self, rows: Rows) -> Tensor:
        """The exact V_t(x) = log E[exp r(x_0) | x_t], by backward recursion."""
        values = [self.table.exp()]
        for matrix in reversed(self.steps):
            values.insert(0, matrix @ values[0])
        return torch.stack(values).log()[rows.steps, index(rows.x)]

    def total_variation(self, results: Tensor, log_weights: Tensor) -> float:
        """Of weighted results from the target, over all sequences."""
        share = torch.zeros(len(STATES), dtype=torch.float64).index_add_(0, index(results), log_weights.softmax(0))
        return float(0.5 * (share - self.target).abs().sum())
