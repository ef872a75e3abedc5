"""How much a search may spend on each prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffalign.search.space import Space


@dataclass(frozen=True)
class Budget:
    """What a search may spend on one prompt; it ends at the first limit that it reaches.

    Attributes:
        nfe: denoiser evaluations, two a step under classifier-free guidance.
        reward_calls: scored results.
        seconds: of wall-clock time; that of prompts searched side by side is shared by them.

    Raises:
        ValueError: no limit, or one that is not positive.
    """

    nfe: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {"nfe": self.nfe, "reward_calls": self.reward_calls, "seconds": self.seconds}
        if not any(limits.values()):
            raise ValueError("a search needs a budget: give nfe, reward_calls or seconds")
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} = {limit} leaves nothing to search with: give a positive number")

    def affords(self, space: Space, prompt: int, nfe: int, reward_calls: int) -> bool:
        """Return whether a prompt's budget pays for so much more."""
        ledger = space.ledgers[prompt]
        return (
            (self.nfe is None or ledger.denoiser_evaluations + nfe <= self.nfe)
            and (self.reward_calls is None or ledger.reward_calls + reward_calls <= self.reward_calls)
            and (self.seconds is None or space.seconds() < self.seconds * space.num_prompts)
        )

    def chains(self, space: Space, scores: int = 1, nfe: int | None = None) -> int | None:
        """How many whole chains a budget of evaluations or scores pays for; None for one of seconds alone.

        Args:
            space: its chains' evaluations.
            scores: reward calls of one chain.
            nfe: denoiser evaluations of one chain; None: one at each step.

        Raises:
            ValueError: it does not pay for one.
        """
        counts, nfe = [], nfe or sum(space.evaluations)
        if self.nfe is not None:
            counts.append(self.nfe // nfe)
        if self.reward_calls is not None:
            counts.append(self.reward_calls // scores)
        if counts and min(counts) < 1:
            raise ValueError(
                f"the budget pays for no whole chain, which takes {nfe} denoiser evaluations and {scores} reward "
                "calls: raise it"
            )
        return min(counts) if counts else None

    def waves(self, space: Space, size: int, scores: int = 1, nfe: int | None = None) -> Iterator[tuple[int, int]]:
        """Divide the chains that the budget pays for into waves of at most `size` of each prompt.

        Args:
            space: its chains' evaluations.
            size: chains of each prompt that are under way at once.
            scores: as for `chains`.
            nfe: as for `chains`.

        Yields:
            (number of the wave's first chain, how many it has), while the budget lasts.
        """
        total, done = self.chains(space, scores, nfe), 0
        while (total is None or done < total) and self.affords(space, 0, 0, 0):
            count = size if total is None else min(size, total - done)
            yield done, count
            done += count
