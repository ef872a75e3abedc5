"""What people preferred: pairs of items of one prompt, and which is better."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffalign.registry import leads_out
from diffalign.scoring.items import Item, file_item

LABELS = "preference"
"""Name of the labels of a set that asked a single question."""


@dataclass(frozen=True)
class Pair:
    """Two items of a prompt, and what people said of them.

    Attributes:
        first, second: indices of items.
        label: 1 where the first is better, -1 where the second is, 0 for a tie.
        prompt: the text; pairs of one prompt are not independent.
        record: number of the entry of the file that it comes from.
    """

    first: int
    second: int
    label: int
    prompt: str
    record: int


@dataclass
class Preferences:
    """A preference set, nothing of its media opened yet.

    Attributes:
        items: each (media, prompt) once.
        pairs: name of the labels -> pairs. A set that asked several questions has several.
        unlabelled: name of the labels -> entries without one, which are left out.
        validation: pairs of another split, by which a published protocol chooses its threshold.
    """

    items: list[Item] = field(default_factory=list)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    unlabelled: dict[str, int] = field(default_factory=dict)
    validation: list[Pair] = field(default_factory=list)
    _known: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    def add_file(self, root: Path, name: str, prompt: str) -> int:
        """The index of a file below `root` with a prompt; what was added before is found again."""
        index = self._known.setdefault((name, prompt), len(self.items))
        if index == len(self.items):
            item = file_item(root / name, prompt, {})
            self.items.append(replace(item, problem="leads out of the folder") if leads_out(name) else item)
        return index


def comparison(first: Any, second: Any) -> int:
    """1 where the first number is the larger, -1 where the second is, 0 where they are equal."""
    return (first > second) - (first < second)
