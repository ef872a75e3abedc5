"""A run: items in, parts on the way, one table, one gallery and the summaries at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign import rewards as known_rewards
from diffalign.processes import process_state
from diffalign.rewards import Reward
from diffalign.scoring.batches import Scorer
from diffalign.scoring.cache import Cache
from diffalign.scoring.decode import decode_ahead
from diffalign.scoring.fingerprint import fingerprint
from diffalign.scoring.gallery import gallery
from diffalign.scoring.inputs import read_inputs
from diffalign.scoring.items import Item
from diffalign.scoring.parts import Parts, write_whole
from diffalign.scoring.request import Request
from diffalign.scoring.summary import RewardSummary, summarise
from diffalign.scoring.table import best, columns_of, write_table


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        out: the file with a row for each item; not there while parts of other shards are missing.
        missing: parts that other shards have not finished yet.
        rows: number of items.
        summaries: of each reward, empty while parts are missing.
        gallery: the page, or None while parts are missing.
        kept: the file with the rows that `keep` keeps, or None.
        hits: reward name -> scores of this process that were known already.
    """

    out: Path
    missing: int
    rows: int
    summaries: list[RewardSummary] = field(default_factory=list)
    gallery: Path | None = None
    kept: Path | None = None
    hits: dict[str, int] = field(default_factory=dict)


def score(
    inputs: str | Path | Sequence[str | Path],
    rewards: Sequence[str | Path | Reward | Callable[..., Any]],
    out: str | Path = "scores.parquet",
    *,
    prompts: str | Path | None = None,
    prompt_column: str | None = None,
    batch_size: int | None = None,
    keep: float | None = None,
    per: str | None = None,
    shard: tuple[int, int] = (0, 1),
    cache: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Scores images and videos in files; every item gets one row, with a score or a reason for each reward.

    The same call goes on where a run was killed, and gives the file that an uninterrupted one would have. What is
    done lies in `OUT.parts/`, which may be removed once the file is there. Under `accelerate launch` processes share
    the work. Equal content is scored once.

    Args:
        inputs: folders (with `.txt` or `.json` sidecars, or a `samples.jsonl`), files, lists (`.csv`, `.jsonl`,
            `.parquet`, with columns for path or bytes, prompt and metadata), WebDataset `.tar` files.
        rewards: names, recipe files, `Reward` objects or functions (see `as_reward`), each of another name.
        out: `.parquet`, `.csv` or `.jsonl`. Beside it lie a gallery, `.html`, and with `keep` the kept rows.
        prompts: a file as for `read_prompts` with one prompt for each item, or one for all, in the place of their own.
        prompt_column: of lists; default: the first of prompt, caption and text.
        batch_size: items at once; None: by their size. Either way it is halved where memory is short.
        keep: the share of the rows that is written to `OUT.kept.SUFFIX`, the best by the first reward.
        per: the column within whose groups the best are kept.
        shard: (number, count): this run does one of `count` shares; the last to finish writes the file.
        cache: a folder, on a local disk, with scores of other runs to use and to add to.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError, ValueError, UnknownName: what was asked for cannot be; value and remedy are named.
        FileExistsError: `out` or a file beside it is there, and no parts: nothing is overwritten.
        DiskRefused: the disk is full or fails; what is done stands.
    """
    places = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    request = Request(
        inputs=tuple(Path(place).expanduser() for place in places),
        rewards=tuple(rewards),
        out=Path(out),
        prompts=prompts,
        prompt_column=prompt_column,
        batch_size=batch_size,
        keep=keep,
        per=per,
        shard=shard,
        cache=None if cache is None else Path(cache),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of files that are scored all the same
        return _run(request, progress)


def _run(request: Request, progress: bool) -> Result:
    folder, state = Path(f"{request.out}.parts"), process_state()
    for path in (request.out, _gallery(request), *([] if request.keep is None else [_kept(request)])):
        if path.exists() and not folder.exists():
            raise FileExistsError(f"{path} is there already: remove it, or choose another --out.")
    items = read_inputs(request)
    if request.per is not None:
        _check_column(request.per, items)
    loaded = load_rewards(request, state.device)
    fingerprints = {reward.name: fingerprint(reward, source) for reward, source in loaded}
    with state.main_process_first():
        parts = Parts(folder, items, fingerprints)
    number, count = request.shard
    mine, of = number * state.num_processes + state.process_index, count * state.num_processes
    cache = Cache(request.cache / "scores.sqlite" if request.cache else folder / f"cache-{mine}-of-{of}.sqlite")
    members = [reward for reward, _ in loaded]
    scorer = Scorer(members, fingerprints, cache, request.batch_size, state.device)
    try:
        score_parts(scorer, parts, items, range(mine, len(parts.chunks), of), progress and state.is_main_process)
    finally:
        cache.close()
    state.wait_for_everyone()
    missing = parts.missing()
    result = Result(request.out, missing, len(items), hits=scorer.hits)
    if state.is_main_process and not missing:
        result = _finish(request, items, parts, result)
    state.wait_for_everyone()
    return result


def load_rewards(request: Request, device: Any) -> list[tuple[Reward, str | Path | None]]:
    """The rewards, each with what it was loaded by."""
    found: dict[str, tuple[Reward, str | Path | None]] = {}
    for asked in request.rewards:
        named = isinstance(asked, str | Path)
        reward = known_rewards.load(asked) if named else known_rewards.as_reward(asked)
        if reward.name in found:
            raise ValueError(f"two rewards are named {reward.name!r}: leave one out, or give it another name.")
        if reward.groupwise:
            raise ValueError(
                f"reward {reward.name!r} compares the samples of a prompt with each other, and files are scored one by "
                "one: choose another."
            )
        found[reward.name] = (reward.to(device), asked if named else None)
    return list(found.values())


def _check_column(name: str, items: Sequence[Item]) -> None:
    columns = sorted({"path", "prompt", *(key for item in items for key in item.metadata)})
    if name not in columns:
        raise ValueError(f"per = {name}: there is no such column; the inputs have {', '.join(columns[:50])}.")


def score_parts(scorer: Scorer, parts: Parts, items: Sequence[Item], share: range, show: bool) -> None:
    """Scores what is not done of a share of the parts, one after the other."""
    todo = [chunk for chunk in share if not parts.done(chunk)]
    ahead = ((index, items[index]) for chunk in todo for index in parts.chunks[chunk])
    videos = any(reward.media == "video" for reward in scorer.rewards)
    total = sum(len(parts.chunks[chunk]) for chunk in share)
    left = sum(len(parts.chunks[chunk]) for chunk in todo)
    with _bar(total, total - left, show) as advance:
        decoded = ((advance(), row)[1] for row in decode_ahead(ahead, videos))
        for chunk, rows in groupby(decoded, key=lambda row: row[0] // parts.rows):
            parts.write(chunk, scorer.score(rows))


@contextmanager
def _bar(total: int, done: int, show: bool) -> Iterator[Callable[[], None]]:
    """Items, speed and time left. Yields what counts one more item."""
    columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[speed_told]}"), disable=not show) as bar:
        task = bar.add_task("scoring", total=total, completed=done, speed_told="")

        def advance() -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=1, speed_told=f"{speed:.1f} items/s" if speed else "")

        yield advance


def _finish(request: Request, items: Sequence[Item], parts: Parts, result: Result) -> Result:
    """Merges the parts, and writes all that is made of the whole."""
    columns = columns_of(items, parts.scores())
    summaries = [summarise(name, columns[name], columns[f"{name}_reason"], columns["prompt"]) for name in parts.names]
    kept = None
    if request.keep is not None:
        kept = _kept(request)
        write_table(best(columns, parts.names[0], request.keep, request.per), kept, parts.folder)
    page = gallery(items, columns, summaries, {"inputs": ", ".join(map(str, request.inputs)), "scores": request.out})
    write_whole(_gallery(request), lambda path: path.write_text(page, encoding="utf-8"), parts.folder)
    write_table(columns, request.out, parts.folder)
    return Result(result.out, 0, result.rows, summaries, _gallery(request), kept, result.hits)


def _gallery(request: Request) -> Path:
    return request.out.with_suffix(".html")


def _kept(request: Request) -> Path:
    return request.out.with_name(f"{request.out.stem}.kept{request.out.suffix}")
