"""Collects what a search finds, with the cost at which it came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffalign.search.found import Found
from diffalign.search.space import Space


class Pool:
    """The results of every prompt of a space so far.

    Attributes:
        space: what is searched.
        weigh: sets `log_weights`, `log_z` and `ancestors`; called before results are read. A maximiser leaves it.
        log_weights: of each prompt, (n,) for its results, or None.
        log_z: of each prompt, or None.
        ancestors: of each prompt, (n,) as in `Found`, or None.
        trees: of each prompt, where the method grows them.
    """

    trees: list[Any]

    def __init__(self, space: Space) -> None:
        self.space = space
        prompts = range(space.num_prompts)
        self._results: list[list[Tensor]] = [[] for _ in prompts]
        self._rows: list[list[tuple[float, int, int, float]]] = [[] for _ in prompts]
        self._best = [math.nan for _ in prompts]
        self.log_weights: list[Tensor | None] = [None for _ in prompts]
        self.log_z: list[float | None] = [None for _ in prompts]
        self.ancestors: list[Tensor | None] = [None for _ in prompts]
        self.weigh: Callable[[], None] = lambda: None
        self.trees = []

    def add(self, results: Tensor, rewards: Tensor, prompts: Tensor) -> list[int | None]:
        """Take scored results, and return each one's index among its prompt's; None for a failed score, left out."""
        seconds, index = self.space.seconds(), []
        for result, reward, prompt in zip(results, rewards.tolist(), prompts.tolist(), strict=True):
            if reward != reward:
                index.append(None)
                continue
            ledger = self.space.ledgers[prompt]
            index.append(len(self._rows[prompt]))
            self._rows[prompt].append((reward, ledger.denoiser_evaluations, ledger.reward_calls, seconds))
            self._results[prompt].append(result)
            self._best[prompt] = max(reward, self._best[prompt])  # of NaN and a number, in this order, the number
        return index

    def count(self, prompt: int) -> int:
        """How many results of a prompt have a reward so far."""
        return len(self._rows[prompt])

    def best(self, prompt: int) -> float:
        """The highest reward of a prompt so far, NaN where nothing has one."""
        return self._best[prompt]

    def rewards(self, prompt: int) -> Tensor:
        """(n,) float64, the rewards of a prompt's results so far."""
        return torch.tensor([row[0] for row in self._rows[prompt]], dtype=torch.float64)

    def found(self) -> list[Found]:
        """What is found so far, for each prompt."""
        self.weigh()
        return [self._found(prompt) for prompt in range(self.space.num_prompts)]

    def _found(self, prompt: int) -> Found:
        table = torch.tensor(self._rows[prompt], dtype=torch.float64).reshape(-1, 4)
        ledger, results = self.space.ledgers[prompt], self._results[prompt]
        ledger.seconds = self.space.seconds() / self.space.num_prompts
        return Found(
            results=torch.stack(results) if results else torch.empty(0),
            rewards=table[:, 0],
            log_weights=self.log_weights[prompt],
            log_z=self.log_z[prompt],
            nfe=table[:, 1].long(),
            reward_calls=table[:, 2].long(),
            seconds=table[:, 3],
            ledger=ledger,
            best_image=self.space.best_image(prompt),
            ancestors=self.ancestors[prompt],
        )
