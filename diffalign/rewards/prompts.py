"""What every reader of prompts does: it says when it cuts one off, and is refused where its words are not its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PromptCache(dict[str, T]):
    """What was made of each prompt, or of what else a text names; past ``most`` of them the oldest goes."""

    def __init__(self, most: int = 16_384) -> None:
        super().__init__()
        self.most = most

    def of(self, prompt: str, make: Callable[[str], T]) -> T:
        """What `make` makes of a prompt, or made of it before."""
        if prompt not in self:
            made = make(prompt)
            if len(self) >= self.most:
                del self[next(iter(self))]
            self[prompt] = made
        return self[prompt]


class PromptReader:
    """A network that reads so many tokens of a prompt and no more.

    Attributes:
        token_limit: tokens that it reads.
        truncated_prompts: how many distinct prompts were longer; the first is told.
    """

    token_limit: int | None
    truncated_prompts: int = 0

    def tell_length(self, label: str, prompt: str, length: int) -> None:
        """Counts a prompt of `length` tokens that is cut off, and logs the first."""
        if self.token_limit is None or length <= self.token_limit:
            return
        self.truncated_prompts += 1
        if self.truncated_prompts == 1:
            logger.warning(
                "%s reads at most %d tokens: prompt %r has %d and is cut off. This is said once; "
                "`truncated_prompts` counts.",
                *(label, self.token_limit, prompt[:80], length),
            )


def check_tokenizer(tokenizer: Any, words: int, source: str) -> None:
    """Some releases of transformers load a tokenizer without its vocabulary, and every word gets the same id.

    Raises:
        ValueError: this happened, or an id is not among the `words` of the model.
    """
    first, second = (tokenizer(text)["input_ids"] for text in ("a red circle", "two blue squares"))
    if set(first) == set(second):
        raise ValueError(f"the tokenizer of {source} knows no word but {first}: its vocabulary did not load.")
    if max(first + second) >= words:
        raise ValueError(
            f"the tokenizer of {source} gives the id {max(first + second)}, and the model knows {words} words: "
            "they do not belong together."
        )
