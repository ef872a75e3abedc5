"""An evaluation that is shared among processes: each takes some of the prompts, and every process gets all results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import gather_object

from diffalign.engine.evaluate import Evaluation
from diffalign.ledger import Ledger

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.data import Prompt

T = TypeVar("T")


def share(items: Sequence[T], rank: int, world: int) -> list[T]:
    """The items of one process, side by side. All shares are equally long: the first items fill up the last ones."""
    size = math.ceil(len(items) / world)
    return [items[i % len(items)] for i in range(rank * size, (rank + 1) * size)]


def join(part: Evaluation, prompts: Sequence[Prompt], accelerator: Accelerator) -> Evaluation:
    """The evaluation of all `prompts` on every process, from each one's part; what filled up a share is left out.

    The ledger is that of all the work that was done.
    """
    if accelerator.num_processes == 1:
        return part
    copies = len(part.prompts) // math.ceil(len(prompts) / accelerator.num_processes)
    length = copies * len(prompts)

    def gather(values: torch.Tensor) -> torch.Tensor:
        return accelerator.gather(values.to(accelerator.device)).cpu()[:length]

    return Evaluation(
        prompts=[p for p in prompts for _ in range(copies)],
        images=gather(part.images),
        scores={name: gather(values) for name, values in part.scores.items()},
        ledger=sum(gather_object([part.ledger]), Ledger()),
    )
