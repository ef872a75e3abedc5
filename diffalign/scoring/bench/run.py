"""A run: the media of a preference set scored once each, then compared pair by pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.processes import process_state
from diffalign.rewards import Reward
from diffalign.scoring.bench.agreement import Agreement, agreement, scored
from diffalign.scoring.bench.datasets import Dataset
from diffalign.scoring.bench.output import write_rows
from diffalign.scoring.bench.preferences import Pair, Preferences
from diffalign.scoring.bench.protocols import half_point_accuracy, inversion_accuracy
from diffalign.scoring.bench.request import BenchRequest
from diffalign.scoring.parts import Parts
from diffalign.scoring.run import check_free, load_rewards, score_items

Scores = Sequence[float | None]


@dataclass(frozen=True)
class Row:
    """A reward against one set of labels.

    Attributes:
        reward: its name.
        labels: what people were asked.
        agreement: how often they agree.
        published: the figure of the set's own protocol where that is another, else None.
    """

    reward: str
    labels: str
    agreement: Agreement
    published: float | None


@dataclass(frozen=True)
class BenchResult:
    """What a run left.

    Attributes:
        out: the file with the rows.
        dataset: the set.
        items: how many (media, prompt) were scored.
        rows: for each reward and each set of labels.
        unlabelled: name of the labels -> entries of the copy without one.
        failures: reward name -> why items have no score, with counts.
        hits: reward name -> scores that were known already.
    """

    out: Path
    dataset: Dataset
    items: int
    rows: list[Row] = field(default_factory=list)
    unlabelled: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Counter[str]] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)


def bench(
    dataset: str,
    folder: str | Path,
    rewards: Sequence[str | Path | Reward | Callable[..., Any]],
    out: str | Path = "bench.json",
    *,
    images: str | Path | None = None,
    batch_size: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> BenchResult:
    """Pairwise accuracy of rewards on a local copy of a published preference set.

    Each (media, prompt) is scored once, by the engine of `score`: the same call goes on where a run was killed, and
    what is done lies in `OUT.parts/`. Under `accelerate launch` processes share the scoring. A pair with a file that
    is missing or cannot be scored is left out and counted.

    Args:
        dataset: a name of `DATASETS`, which says where a copy has what.
        folder: the copy; nothing is downloaded.
        rewards: names, recipe files, `Reward` objects or functions (see `as_reward`), each of another name.
        out: `.json` or `.csv`.
        images: the folder that the paths of the set start from, where it is not the published one.
        batch_size: items at once; None: by their size.
        cache: a folder, on a local disk, with scores of other runs to use and to add to.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError, ValueError, UnknownName: what was asked for cannot be; value and remedy are named.
        FileExistsError: `out` is there, and no parts: nothing is overwritten.
        DiskRefused: the disk is full or fails; what is done stands.
    """
    request = BenchRequest(
        dataset=dataset,
        folder=Path(folder).expanduser(),
        rewards=tuple(rewards),
        out=Path(out),
        images=None if images is None else Path(images).expanduser(),
        batch_size=batch_size,
        cache=None if cache is None else Path(cache),
    )
    return run_request(request, progress)


def run_request(request: BenchRequest, progress: bool = True) -> BenchResult:
    """As `bench`."""
    check_free(request, request.out)
    preferences, loaded = request.source.read(request.folder, request.images), load_rewards(request)
    for reward, _ in loaded:
        if reward.media != request.source.media:
            raise ValueError(
                f"reward {reward.name!r} scores {reward.media}s, and {request.dataset} compares "
                f"{request.source.media}s: choose another."
            )
        if reward.groupwise:
            raise ValueError(
                f"reward {reward.name!r} compares all samples of a prompt, and {request.dataset} asks about two: "
                "choose another."
            )
    parts, hits = score_items(request, preferences.items, loaded, progress)
    return _finish(request, preferences, parts, hits)


def _finish(request: BenchRequest, preferences: Preferences, parts: Parts, hits: dict[str, int]) -> BenchResult:
    found = parts.scores()
    rows = [
        Row(name, labels, agreement(pairs, values), _published(request.source, pairs, preferences.validation, values))
        for name, (values, _) in found.items()
        for labels, pairs in preferences.pairs.items()
    ]
    failures = {name: Counter(reason for reason in reasons if reason) for name, (_, reasons) in found.items()}
    if process_state().is_main_process:
        write_rows(request.out, request.source, request.folder, rows, preferences.unlabelled, parts.folder)
    process_state().wait_for_everyone()
    items, unlabelled = len(preferences.items), preferences.unlabelled
    return BenchResult(request.out, request.source, items, rows, unlabelled, failures, hits)


def _published(dataset: Dataset, pairs: Sequence[Pair], validation: Sequence[Pair], values: Scores) -> float | None:
    """The figure of the set's own protocol; None where it is one of the accuracies, or cannot be had."""
    judged, differences = scored(pairs, values)
    labels = [pair.label for pair in judged]
    if not judged or dataset.column is None:
        return None
    if dataset.column == "inversions":
        return inversion_accuracy(labels, differences, [pair.record for pair in judged])
    chosen_by, its_differences = scored(validation, values)
    if not chosen_by:
        return None
    return half_point_accuracy(labels, differences, [pair.label for pair in chosen_by], its_differences)
