"""What a search found for one prompt, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffalign.ledger import Ledger
from diffalign.noise import generator
from diffalign.search.weights import effective_size, systematic


@dataclass(eq=False)
class Found:
    """Weighted results of one prompt.

    The weights are those of the target p(x_0) exp(lambda r(x_0)), p being the law of the chain's result: averages
    under `log_weights` tend to averages under the target as the budget grows. A maximiser sets no weights.

    Attributes:
        results: (n, ...) ends of chains that have a reward, in the order in which they were found.
        rewards: (n,) float64 on the host.
        log_weights: (n,) float64, not normalised; None where the method searches for the best only.
        log_z: estimate of log E_p[exp(lambda r)], or None.
        ancestors: (n,) int64, the first state that each descends from: the fewer are distinct, the less the results
            differ; None where the method does not tell.
        nfe: (n,) denoiser evaluations spent when each was found.
        reward_calls: (n,) scores spent likewise.
        seconds: (n,) likewise.
        ledger: what the whole search cost.
        best_image: (3, H, W) the best one's pixels, where results are latents of images.
    """

    results: Tensor
    rewards: Tensor
    log_weights: Tensor | None
    log_z: float | None
    nfe: Tensor
    reward_calls: Tensor
    seconds: Tensor
    ledger: Ledger = field(default_factory=Ledger)
    best_image: Tensor | None = None
    ancestors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def best(self) -> int | None:
        """Index of the highest reward, the first of equals; None where nothing has a reward."""
        return int(self.rewards.argmax()) if len(self) else None

    @property
    def reward(self) -> float:
        """The highest reward, NaN where nothing has one."""
        return math.nan if self.best is None else float(self.rewards[self.best])

    def curve(self) -> Tensor:
        """The best reward so far, (n,): the anytime curve over `nfe`, `reward_calls` or `seconds`."""
        return self.rewards.cummax(0).values if len(self) else self.rewards

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """Indices (count,) of results drawn with replacement by their weights; systematic resampling.

        Raises:
            ValueError: the method sets no weights, or found nothing.
        """
        if self.log_weights is None or not len(self):
            raise ValueError(
                "there are no weighted results to draw from: use a method that samples, such as importance"
            )
        uniform = generator(seed, "draw").random()
        index = systematic(self.log_weights, count, uniform)
        # Neighbours in the order of discovery stand together: shuffled, so that any part of the draw is one too.
        return index[torch.from_numpy(np.asarray(generator(seed, "shuffle").permutation(count)))]

    @property
    def effective_size(self) -> float:
        """(sum w)^2 / sum w^2: how many samples of the target the weighted results are worth."""
        return float(effective_size(self.log_weights)) if self.log_weights is not None else math.nan
