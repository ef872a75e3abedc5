"""Masked-discrete chains as a space to search: tokens in the place of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.laws import Categorical, Level, MaskedDiffusion, Normal, Schedule
from diffalign.noise import uniform
from diffalign.search.space import Path, Rows, Space


class MaskedSpace(Space):
    """Chains of L tokens from all masks to none, by `MaskedDiffusion`.

    Args:
        network: (tokens (B, L) int64, level of each row, prompts (B,) on the host) -> logits (B, L, V) of x_0.
        reward: (tokens (B, L), prompts (B,)) -> rewards (B,), NaN where they failed.
        law: of a step.
        schedule: the levels; sigma is the probability that a token is masked.
        length: L.
        ids: of the prompts, their addresses in the noise.
        seed: the run's seed.
        micro_batch_size: see `Space`.
        device: of the tokens.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Level, Tensor], Tensor],
        reward: Callable[[Tensor, Tensor], Tensor],
        law: MaskedDiffusion,
        schedule: Schedule,
        length: int,
        *,
        ids: Sequence[int | str] = (0,),
        seed: int = 0,
        micro_batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.reward, self.law, self.schedule, self.length = network, reward, law, schedule, length
        self.ids, self.seed, self.micro_batch_size = list(ids), seed, micro_batch_size
        self.device = torch.device(device)
        self.num_prompts, self.num_steps = len(self.ids), len(schedule)
        self.stochastic, self.evaluations = [True] * len(schedule), [1] * len(schedule)
        self.start()

    def initial(self, prompts: Tensor, paths: Sequence[Path]) -> Rows:
        """All tokens masked."""
        x = torch.full((len(prompts), self.length), self.law.mask_id, device=self.device)
        return Rows(x, torch.zeros(len(prompts), dtype=torch.long), prompts)

    def evaluate(self, rows: Rows) -> Tensor:
        """Logits of x_0, (B, L, V)."""
        return self.network(rows.x, self.schedule.level(rows.steps, self.device), rows.prompts)

    def transition(self, rows: Rows, output: Tensor) -> Categorical:
        """The law's distribution of the tokens of each row."""
        level, to = (at(rows.steps, self.device) for at in (self.schedule.level, self.schedule.target))
        return self.law.step(output, rows.x, level, to)

    def draw(self, transition: Normal | Categorical, rows: Rows, paths: Sequence[Path]) -> Tensor:
        """Draw the next tokens."""
        return transition.sample(self._uniform("step", rows, paths))

    def guesses(self, rows: Rows, output: Tensor, paths: Sequence[Path], count: int) -> Tensor:
        """Draw x_0 with independent tokens, (count, B, L): the means that a Gaussian chain has do not exist here."""
        level = self.schedule.level(rows.steps, self.device)
        clean = Level(torch.ones_like(level.alpha), torch.zeros_like(level.sigma), torch.zeros_like(level.timestep))
        transition = self.law.step(output, rows.x, level, clean)
        return torch.stack([transition.sample(self._uniform(f"guess {k}", rows, paths)) for k in range(count)])

    def rate(self, results: Tensor, prompts: Tensor) -> Tensor:
        """Rewards of tokens, counted."""
        values = self.reward(results, prompts)
        self.count_scores(values, prompts)
        return values

    def _uniform(self, purpose: str, rows: Rows, paths: Sequence[Path]) -> Tensor:
        address = [(self.ids[p], *path) for p, path in zip(rows.prompts.tolist(), paths, strict=True)]
        where = {"step": rows.steps.tolist(), "device": self.device}
        return uniform((self.length,), seed=self.seed, purpose=purpose, rows=address, **where)
