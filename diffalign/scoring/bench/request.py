"""What is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.scoring.bench.datasets import Dataset, check_folder, find_dataset
from diffalign.scoring.request import CommonRequest

SUFFIXES = (".json", ".csv")


@dataclass(frozen=True, kw_only=True)
class BenchRequest(CommonRequest):
    """The arguments of `bench`, which describes them. ValueError and FileNotFoundError say what is wrong."""

    dataset: str
    folder: Path
    images: Path | None = None

    def __post_init__(self) -> None:
        check_folder(self.source, self.folder)
        if self.out.suffix not in SUFFIXES:
            raise ValueError(
                f"out = {self.out}: accuracies are written as {' or '.join(SUFFIXES)}, so end it with one."
            )
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"--images {self.images} is no folder: name the one that the paths start from.")
        super().__post_init__()

    @property
    def source(self) -> Dataset:
        """The set that is asked for."""
        return find_dataset(self.dataset)
