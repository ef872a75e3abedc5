"""What is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.scoring.bench.datasets import Dataset, check_folder, find_dataset
from diffalign.scoring.request import Request

if TYPE_CHECKING:
    from diffalign.rewards import Reward

SUFFIXES = (".json", ".csv")


@dataclass(frozen=True)
class BenchRequest:
    """The arguments of `bench`, which describes them. ValueError and FileNotFoundError say what is wrong."""

    dataset: str
    folder: Path
    rewards: tuple[str | Path | Reward | Callable[..., Any], ...]
    out: Path
    images: Path | None = None
    batch_size: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        check_folder(self.source, self.folder)
        if self.out.suffix not in SUFFIXES:
            raise ValueError(
                f"out = {self.out}: accuracies are written as {' or '.join(SUFFIXES)}, so end it with one."
            )
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"--images {self.images} is no folder: name the one that the paths start from.")
        _ = self.scores

    @property
    def source(self) -> Dataset:
        """The set that is asked for."""
        return find_dataset(self.dataset)

    @property
    def scores(self) -> Request:
        """What it asks of the engine that scores; made to be checked, and to load the rewards."""
        table = Path("scores.parquet")  # never written: the scores stay in the parts
        return Request((self.folder,), self.rewards, table, batch_size=self.batch_size, cache=self.cache)
