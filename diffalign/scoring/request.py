"""What is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.recipe_references import reward_names
from diffalign.registry import UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffalign.rewards import Reward

SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class CommonRequest:
    """What `score` and `bench` are both asked for."""

    rewards: tuple[str | Path | Reward | Callable[..., Any], ...]
    out: Path
    batch_size: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(
                "no reward was named: give --reward with a name (diffalign ls rewards) or a recipe's file."
            )
        for reward in self.rewards:
            if isinstance(reward, str | Path):
                _known(str(reward))
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}: give 1 or more, or auto.")

    @property
    def parts(self) -> Path:
        """The folder of what is done."""
        return Path(f"{self.out}.parts")


@dataclass(frozen=True, kw_only=True)
class Request(CommonRequest):
    """The arguments of `score`, which describes them. ValueError and FileNotFoundError say what is wrong."""

    inputs: tuple[Path, ...]
    prompts: str | Path | None = None
    prompt_column: str | None = None
    keep: float | None = None
    per: str | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("nothing to score was named: give folders, files, lists (.csv, .jsonl, .parquet) or .tar.")
        for path in self.inputs:
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist: give a folder, a file, or a list of files.")
            if path.name.casefold().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
                raise ValueError(f"{path} is compressed: tars are read in place, so unpack it to a plain .tar first.")
        super().__post_init__()
        if self.out.suffix not in SUFFIXES:
            raise ValueError(
                f"out = {self.out}: scores are written as {', '.join(SUFFIXES)}, so end it with one of them."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"keep = {self.keep:g}: give the share of rows to keep, above 0 and at most 1, such as 0.1."
            )
        if self.per is not None and self.keep is None:
            raise ValueError(
                f"per = {self.per} says within what to keep the best: give --keep too, such as --keep 0.1."
            )
        number, count = self.shard
        if not 0 <= number < count:
            raise ValueError(
                f"shard {number}/{count}: shards count from 0, so give 0/{max(count, 1)} to "
                f"{max(count, 1) - 1}/{max(count, 1)}."
            )


def _known(name: str) -> None:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).expanduser().is_file():
            raise FileNotFoundError(f"reward recipe {name} does not exist: give a reward's name, or a recipe's file.")
    elif name.removeprefix("zoo:").casefold() not in reward_names():
        raise UnknownName("reward", name, reward_names())
