"""What every search has in common: its settings, and the way from a policy and a reward to results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, overload

from diffalign.data import Prompt
from diffalign.policies import Policy
from diffalign.registry import Registry
from diffalign.rewards import Reward
from diffalign.search.budget import Budget
from diffalign.search.config import ChainConfig
from diffalign.search.found import Found
from diffalign.search.pool import Pool
from diffalign.search.space import Space
from diffalign.settings import Settings

SEARCHES: Registry[type[Search]] = Registry("search")
"""Methods by the name that a recipe gives them; `METHODS` has their settings under the same name."""


class Search(ABC):
    """One way through the chain, under a budget.

    `Search(policy, reward, ...).search(prompts, nfe=...)` searches a pipeline; `Search(...).run(space, budget)` any
    other `Space`, and needs neither policy nor reward.

    Args:
        policy: the pipeline to search.
        reward: a `Reward`, or any function `(images (B, 3, H, W) in [0, 1], prompts, metadata) -> (B,)`.
        **settings: the fields of `ChainConfig` and of the method's own config.
    """

    config_class: ClassVar[type[Settings]]

    def __init__(
        self, policy: Policy | None = None, reward: Reward | Callable[..., Any] | None = None, **settings: Any
    ) -> None:
        shared = {k: settings.pop(k) for k in list(settings) if k in ChainConfig.model_fields}
        self.chain = ChainConfig(**shared)
        self.config = self.config_class(**settings)
        self.policy, self.reward = policy, reward

    @overload
    def search(self, prompts: str, **budget: Any) -> Found: ...
    @overload
    def search(self, prompts: Sequence[str | Prompt], **budget: Any) -> list[Found]: ...

    def search(self, prompts: str | Sequence[str | Prompt], **budget: Any) -> Found | list[Found]:
        """Search the pipeline for prompts, side by side.

        Args:
            prompts: one, or several.
            **budget: of each prompt: `nfe`, `reward_calls` or `seconds`; see `Budget`.

        Returns:
            What was found for the prompt, or for each in their order.

        Raises:
            ValueError: there is no policy or reward, or the method cannot search them.
        """
        from diffalign.search.policy_space import PolicySpace

        if self.policy is None or self.reward is None:
            raise ValueError("there is no policy or no reward to search with: give both to the search, or use run")
        space = PolicySpace(self.policy, self.reward, [prompts] if isinstance(prompts, str) else prompts, self.chain)
        found = self.run(space, Budget(**budget))
        return found[0] if isinstance(prompts, str) else found

    def run(self, space: Space, budget: Budget, on_round: Callable[[Pool], object] | None = None) -> list[Found]:
        """Search a space until the budget is spent; `on_round` is called after every round."""
        for pool in self.stream(space, budget):
            if on_round is not None:
                on_round(pool)
        return pool.found()

    def stream(self, space: Space, budget: Budget) -> Iterator[Pool]:
        """Search, and yield what is collected after every round: it may be left at any time."""
        self.check(space)
        space.start()
        pool = Pool(space)
        yield pool
        for _ in self.explore(space, budget, pool):
            yield pool

    def check(self, space: Space) -> None:  # noqa: B027  most methods search any space
        """Raise ValueError where the method cannot search the space."""

    @abstractmethod
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Search, collect results in the pool, and yield after every round."""
