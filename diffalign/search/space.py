"""What a search moves through: the chains of several prompts side by side, and the reward at their ends."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.laws import Categorical, Law, Normal, Prediction, PredictionKind, Schedule
from diffalign.ledger import Ledger
from diffalign.noise import Address, normal

Path = tuple[int, ...]
"""Where a row comes from inside its prompt: a sample's or particle's number, or the children on the way to a node."""


@dataclass(eq=False)
class Rows:
    """States anywhere in the chains.

    Attributes:
        x: (B, ...) states.
        steps: (B,) int64 on the host; the step that each will take next, N at the end of the chain.
        prompts: (B,) int64 on the host; the number of each one's prompt.
    """

    x: Tensor
    steps: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Rows:
        return Rows(self.x[index], self.steps[index], self.prompts[index])

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Join rows."""
        return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "steps", "prompts")))


class Space(ABC):
    """The chains of P prompts, each of N steps from noise to a result, and the reward of a result.

    Rows of one batch may stand at different steps and belong to different prompts. What a row becomes depends on its
    state, its prompt and its path alone: not on its neighbours, nor on ``micro_batch_size``, beyond rounding.

    Attributes:
        num_prompts: P.
        num_steps: N.
        ids: (P,) of the prompts, their addresses in the noise.
        seed: the run's seed.
        stochastic: (N,) which steps draw noise.
        evaluations: (N,) denoiser evaluations of a prediction at each step, two under classifier-free guidance.
        differentiable: whether the reward has a gradient.
        micro_batch_size: rows predicted, decoded or scored at once; None: all.
        ledgers: the cost so far, of each prompt.
    """

    num_prompts: int
    num_steps: int
    ids: list[int | str]
    seed: int
    stochastic: list[bool]
    evaluations: list[int]
    differentiable: bool = True
    micro_batch_size: int | None
    ledgers: list[Ledger]

    def start(self) -> None:
        """Begin to count anew."""
        self.ledgers = [Ledger() for _ in range(self.num_prompts)]
        self.started = time.perf_counter()

    @abstractmethod
    def initial(self, prompts: Tensor, paths: Sequence[Path]) -> Rows:
        """Draw first states; of equal prompt and path equal ones."""

    @abstractmethod
    def evaluate(self, rows: Rows) -> Tensor:
        """Evaluate the network for one micro-batch, (B, ...)."""

    @abstractmethod
    def transition(self, rows: Rows, output: Tensor) -> Normal | Categorical:
        """Return the distribution of the next states, given the network's output at these."""

    @abstractmethod
    def draw(self, transition: Normal | Categorical, rows: Rows, paths: Sequence[Path]) -> Tensor:
        """Draw the next states with the noise of (prompt, path, step)."""

    @abstractmethod
    def guesses(self, rows: Rows, output: Tensor, paths: Sequence[Path], count: int) -> Tensor:
        """Return results that the states may lead to, (count or 1, B, ...): a mean where it says it all, else draws."""

    @abstractmethod
    def rate(self, results: Tensor, prompts: Tensor) -> Tensor:
        """Return the rewards (B,) of one micro-batch of results, NaN where they failed; counts what it cost.

        Where gradients are enabled and `differentiable` says so, they flow from the rewards to the results.
        """

    def predict(self, rows: Rows, recompute: bool = False) -> Tensor:
        """Evaluate the network in micro-batches, (B, ...), and count it.

        Args:
            rows: where.
            recompute: store nothing for a backward pass, and evaluate again in it; that is not counted.
        """
        for ledger, cost in zip(self.ledgers, self._costs(rows), strict=True):
            ledger.denoiser_evaluations += cost
        parts = [rows[part] for part in self.micro_batches(len(rows))]
        if not recompute:
            return torch.cat([self.evaluate(part) for part in parts])
        # Nothing in an evaluation is random, so no random state need be kept for its repetition.
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self.evaluate, part, **how) for part in parts])  # type: ignore[misc]

    def checkpoint_blocks(self) -> None:  # noqa: B027  a space need not have any
        """From now on compute the network's blocks again in backward passes, where it has any."""

    def count_backward(self, rows: Rows) -> None:
        """Count the backward pass through the network's evaluation at these rows."""
        for ledger, cost in zip(self.ledgers, self._costs(rows), strict=True):
            ledger.backward_passes += cost

    def _costs(self, rows: Rows) -> list[int]:
        """Denoiser evaluations of a prediction at these rows, of each prompt."""
        costs = np.bincount(rows.prompts, np.asarray(self.evaluations)[rows.steps.numpy()], self.num_prompts)
        return [int(cost) for cost in costs]

    def advance(self, rows: Rows, output: Tensor, paths: Sequence[Path]) -> Rows:
        """Take one step, given the network's output."""
        x = self.draw(self.transition(rows, output), rows, paths)
        return Rows(x, rows.steps + 1, rows.prompts)

    def rate_guesses(self, guesses: Tensor, prompts: Tensor) -> Tensor:
        """As `rate`, of what no chain ended in."""
        return self.rate(guesses, prompts)

    @torch.no_grad()
    def score(self, results: Tensor, prompts: Tensor) -> Tensor:
        """Rewards (B,) in float64 on the host, NaN where they failed, in micro-batches."""
        parts = [self.rate(results[part], prompts[part]) for part in self.micro_batches(len(results))]
        return torch.cat(parts).double().cpu()

    @torch.no_grad()
    def score_guesses(self, guesses: Tensor, prompts: Tensor) -> Tensor:
        """As `score`, of what no chain ended in."""
        parts = [self.rate_guesses(guesses[part], prompts[part]) for part in self.micro_batches(len(guesses))]
        return torch.cat(parts).double().cpu()

    def best_image(self, prompt: int) -> Tensor | None:
        """The pixels (3, H, W) of a prompt's best result, where results are images."""
        return None

    def micro_batches(self, count: int) -> Iterator[slice]:
        """Slices of at most `micro_batch_size` rows."""
        size = self.micro_batch_size or max(count, 1)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def count_scores(self, values: Tensor, prompts: Tensor, decodes: int = 0) -> None:
        """Count the scoring of one micro-batch, with `decodes` decoded images for each result."""
        counts = np.bincount(prompts, minlength=self.num_prompts).tolist()
        failures = np.bincount(prompts, values.isnan().cpu(), self.num_prompts).tolist()
        for ledger, count, failed in zip(self.ledgers, counts, failures, strict=True):
            ledger.decodes += decodes * count
            ledger.reward_calls += count
            ledger.reward_failures += int(failed)

    def seconds(self) -> float:
        """Seconds since `start`; the prompts of a space share them."""
        return time.perf_counter() - self.started


class GaussianSpace(Space):
    """Chains whose steps are those of a `Law` over the levels of a `Schedule`. Subclasses write `evaluate`, `rate`.

    Args:
        law: of a step.
        schedule: the levels.
        shape: of a state, without the batch.
        kind: what the network's output means.
        ids: of the prompts, their addresses in the noise.
        seed: the run's seed.
        micro_batch_size: see `Space`.
        dtype: of the states.
        device: of the states.
    """

    def __init__(
        self,
        law: Law,
        schedule: Schedule,
        shape: Sequence[int],
        kind: PredictionKind,
        *,
        ids: Sequence[int | str] = (0,),
        seed: int = 0,
        micro_batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.law, self.schedule, self.shape, self.kind = law, schedule, tuple(shape), kind
        self.ids, self.seed, self.micro_batch_size = list(ids), seed, micro_batch_size
        self.dtype, self.device = dtype, torch.device(device)
        self.num_prompts, self.num_steps = len(self.ids), len(schedule)
        self.stochastic = (law.stds(schedule) > 0).tolist()
        self.evaluations = [1] * len(schedule)
        self.start()

    def initial(self, prompts: Tensor, paths: Sequence[Path]) -> Rows:
        """Draw standard normal first states."""
        steps = torch.zeros(len(prompts), dtype=torch.long)
        return Rows(self.first(self.noise("initial", prompts, paths, steps)), steps, prompts)

    def first(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise into first states, (B, ...)."""
        return noise

    def noise(self, purpose: str, prompts: Tensor, paths: Sequence[Path], steps: Tensor) -> Tensor:
        """Draw addressed standard normal noise, (B, ...)."""
        rows: list[Address] = [(self.ids[p], *path) for p, path in zip(prompts.tolist(), paths, strict=True)]
        where = {"device": self.device, "dtype": self.dtype}
        return normal(self.shape, seed=self.seed, purpose=purpose, rows=rows, step=steps.tolist(), **where)

    def prediction(self, rows: Rows, output: Tensor) -> Prediction:
        """Return what the network's output says."""
        return Prediction(output, rows.x, self.schedule.level(rows.steps, self.device), self.kind)

    def transition(self, rows: Rows, output: Tensor) -> Normal:
        """Return the law's Gaussian of each row."""
        return self.law.step(self.prediction(rows, output), self.schedule.target(rows.steps, self.device))

    def draw(self, transition: Normal | Categorical, rows: Rows, paths: Sequence[Path]) -> Tensor:
        """Draw the next states; rows whose step is deterministic take no noise."""
        assert isinstance(transition, Normal)
        noisy = [i for i, step in enumerate(rows.steps.tolist()) if self.stochastic[step]]
        if not noisy:
            return transition.mean
        noise = self.noise("step", rows.prompts[noisy], [paths[i] for i in noisy], rows.steps[noisy])
        if len(noisy) < len(rows):
            noise = torch.zeros_like(transition.mean).index_copy(0, torch.tensor(noisy, device=noise.device), noise)
        return transition.sample(noise)

    def guesses(self, rows: Rows, output: Tensor, paths: Sequence[Path], count: int) -> Tensor:
        """Return the predicted mean of x_0 (Tweedie), (1, B, ...)."""
        return self.prediction(rows, output).x0[None]
