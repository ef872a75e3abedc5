r"""Weighted particles: what they may lead to, and resampling that keeps their weights right.

A particle carries two numbers. Its weight w is proper for the chain's law p: for every function f of a state,

    E[mean_k w_k f(x_k)] = E_p[f(x)].

Its twist psi says how promising it is, and acts on nothing but the choice of who is copied:

    P(k is copied to a given place) = w_k psi_k / sum_j w_j psi_j,     w of the copy = mean_j(w_j psi_j) / psi_k,

which keeps weights proper for any positive psi, whatever it depends on: resampling by priority scores (Liu, Chen &
Logvinenko 2001, "A theoretical framework for sequential importance sampling with resampling"). At the end of the chain
w exp(lambda r) is the weight for the target, and its mean an unbiased estimate of Z = E_p[exp(lambda r)]. Nothing has
to be divided out, and what is not resampled is not forgotten.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffalign.search.pool import Pool
from diffalign.search.space import GaussianSpace, Path, Rows, Space
from diffalign.search.weights import effective_size, log_mean_exp, normalised

Potential = Literal["diff", "max", "add", "rt"]


def guesses_of(space: Space, draws: int) -> int:
    """How many results are guessed for a state: the predicted mean of a Gaussian chain, else as many as are drawn."""
    return 1 if isinstance(space, GaussianSpace) else draws


def look_ahead(space: Space, rows: Rows, output: Tensor, paths: list[Path], scale: float, draws: int) -> Tensor:
    """Log mean exp(lambda r) over guesses of what the states lead to, without another evaluation of the network.

    Args:
        space: of the states.
        rows: B states.
        output: the network's at them.
        paths: of the states.
        scale: lambda.
        draws: guesses for each state, where the space draws them.

    Returns:
        (B,) float64 on the host, NaN where no guess has a finite reward.
    """
    guesses = space.guesses(rows, output, paths, draws)
    rewards = space.score_guesses(guesses.flatten(0, 1), rows.prompts.repeat(len(guesses))).reshape(len(guesses), -1)
    valid = rewards.isfinite()
    return (scale * rewards).masked_fill(~valid, -math.inf).logsumexp(0) - valid.sum(0).log()


def with_neutral(values: Tensor) -> Tensor:
    """Log potentials (..., K) with log mean exp of the others in the place of NaN; a row of NaN stays one.

    A failed score says nothing about its particle, which so becomes neither less nor more likely to be copied.
    """
    known = ~values.isnan()
    mean = values.masked_fill(~known, -math.inf).logsumexp(-1) - known.sum(-1).log()
    return torch.where(known, values, mean[..., None])


def multinomial(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Independent draws from weights (B, K), not normalised, by numbers (B, n) in [0, 1): indices (B, n)."""
    cumulative = normalised(log_weights).cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return index.clamp(max=log_weights.shape[1] - 1)


def log_evidence(log_weights: Tensor, log_rewards: Tensor) -> float | None:
    """Estimate log Z from proper log weights (n,) and lambda r (n,), NaN where it failed; None where all did.

    Unbiased for Z when all have a reward. Else Z is that of p restricted to results that have one, as independent
    samples give it.
    """
    valid = ~log_rewards.isnan()
    if not valid.any():
        return None
    log_share = normalised(log_weights)[valid].sum().log() if not valid.all() else torch.tensor(0.0)
    total = (log_weights + log_rewards)[valid].logsumexp(0) - math.log(len(valid))
    return float(total - log_share)


class Harvest:
    """Weighted results of a search that samples the target, as they come.

    Args:
        pool: where the results themselves are.
        target_lambda: lambda.
    """

    def __init__(self, pool: Pool, target_lambda: float) -> None:
        self.pool, self.target_lambda = pool, target_lambda
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        pool.weigh = self.weigh

    def __len__(self) -> int:
        """How many times results were added."""
        return len(self._parts)

    def add(self, rows: Rows, log_weights: Tensor, ancestors: Tensor) -> Tensor:
        """Score results and take them to the pool.

        Args:
            rows: (P n) ends of chains, those of a prompt together.
            log_weights: (P, n) proper for the chain's law.
            ancestors: (P, n), the first state that each descends from, as a number of its own in the prompt.

        Returns:
            (P, n) rewards, NaN where they failed.
        """
        rewards = self.pool.space.score(rows.x, rows.prompts)
        self.pool.add(rows.x, rewards, rows.prompts)
        self._parts.append((log_weights, rewards.reshape(log_weights.shape), ancestors))
        return self._parts[-1][1]

    def weigh(self) -> None:
        """Tell the pool what the results weigh."""
        if not self._parts:
            return
        weights, rewards, ancestors = (torch.cat(each, 1) for each in zip(*self._parts, strict=True))
        for prompt, valid in enumerate(~rewards.isnan()):
            tilts = self.target_lambda * rewards[prompt]
            self.pool.log_weights[prompt] = (weights[prompt] + tilts)[valid]
            self.pool.ancestors[prompt] = ancestors[prompt, valid]
            self.pool.log_z[prompt] = log_evidence(weights[prompt], tilts)


class Swarm:
    """K weighted particles of each of P prompts, all at one step; row p K + k is particle k of prompt p.

    Attributes:
        rows: the states.
        potential: how rewards of guesses make the twist; see `twist`.
        log_weights: (P, K) float64 on the host, proper for the chain's law.
        log_twist: (P, K), log psi.
        ancestors: (P, K) int64, the first state that each descends from.
    """

    def __init__(self, rows: Rows, prompts: int, potential: Potential = "diff") -> None:
        self.rows, self.potential = rows, potential
        self.log_weights = torch.zeros(prompts, len(rows) // prompts, dtype=torch.float64)
        self.log_twist = torch.zeros_like(self.log_weights)
        self.ancestors = torch.arange(self.size).repeat(prompts, 1)
        self._memory = torch.full_like(self.log_weights, -math.inf if potential == "max" else 0.0)

    @property
    def size(self) -> int:
        """K."""
        return self.log_weights.shape[1]

    def twist(self, values: Tensor) -> Tensor:
        """Update psi by lambda r_t of the guesses at this level.

        diff: psi = exp(lambda r_t). rt: psi *= exp(lambda r_t). max: psi *= exp(lambda max_{s >= t} r_s).
        add: psi *= exp(lambda sum_{s >= t} r_s).

        Args:
            values: (P K,) lambda r_t, NaN where it failed.

        Returns:
            (P,) bool, prompts with any value; the psi of others stays.
        """
        values = with_neutral(values.reshape(self.log_weights.shape))
        some = ~values.isnan().any(1)
        memory = {"max": torch.maximum(self._memory, values), "add": self._memory + values}.get(self.potential, values)
        log_twist = memory if self.potential == "diff" else self.log_twist + memory
        self._memory = torch.where(some[:, None], memory, self._memory)
        self.log_twist = torch.where(some[:, None], log_twist, self.log_twist)
        return some

    def uneven(self, threshold: float) -> Tensor:
        """(P,) bool, prompts where the effective size of weights times psi is below a share of K."""
        least = threshold * self.size * (1 - 1e-9)  # equal weights are K, rounding apart
        return effective_size(self.log_weights + self.log_twist) < least

    def copy(self, chosen: Tensor, prompts: Tensor) -> Tensor:
        """Put copies of particles drawn by weight times psi in the places of all, with their weights.

        Args:
            chosen: (P, K) which particle is copied to each place.
            prompts: (P,) bool, those that are resampled; others stay as they are.

        Returns:
            (P K,) which row stands in each place now.
        """
        chosen = torch.where(prompts[:, None], chosen, torch.arange(self.size))
        mean = log_mean_exp(self.log_weights + self.log_twist)[:, None]
        weights = mean - self.log_twist.gather(1, chosen)
        self.log_weights = torch.where(prompts[:, None], weights, self.log_weights)
        self.log_twist, self.ancestors, self._memory = (
            each.gather(1, chosen) for each in (self.log_twist, self.ancestors, self._memory)
        )
        index = (torch.arange(len(chosen))[:, None] * self.size + chosen).flatten()
        self.rows = self.rows[index]
        return index
