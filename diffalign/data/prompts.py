"""Prompt files, and which prompts a training step sees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.parquet import open_parquet, read_rows
from diffalign.data.rows import PROMPT_KEYS, take_text
from diffalign.noise import generator
from diffalign.registry import PROMPT_SUFFIXES, resolve_data

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prompt:
    """A prompt of a set.

    Attributes:
        text: what the model reads.
        id: its address in the noise and the key of its group. Two prompts with the same text have their own ids.
        metadata: what else the file says of it; rewards get it.
    """

    text: str
    id: int | str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts, by the file's suffix.

    - ``.txt``: one a line.
    - ``.jsonl``: an object a line, with ``prompt`` (or ``caption``) and any metadata.
    - ``.parquet``: a row each, in the column ``prompt`` (or ``caption``). Columns of texts, numbers and truth values,
      and of lists and structs of these, are metadata; others, such as images, are not read.

    The id of a prompt is the index of its line or row, counted from 0, or what the file has as ``id``. Blank lines are
    skipped.

    Args:
        path: a file, or ``prompts:NAME`` for a set that ships with the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: file and line of what is wrong.
    """
    path = resolve_data(path, relative_to=Path.cwd())
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist.")
    if path.suffix not in PROMPT_SUFFIXES:
        raise ValueError(
            f"{path}: prompts are read from {', '.join(PROMPT_SUFFIXES)} files, "
            f"not {path.suffix or 'one without suffix'}."
        )
    prompts: dict[int | str, Prompt] = {}
    for source, prompt in _parquet_prompts(path) if path.suffix == ".parquet" else _line_prompts(path):
        if prompt.id in prompts:
            raise ValueError(f"{source}: the id {prompt.id!r} is already taken by an earlier prompt.")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return list(prompts.values())


def _line_prompts(path: Path) -> Iterator[tuple[str, Prompt]]:
    """Each prompt of a text file, and where it stands."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: split it.")
    for index, raw in enumerate(path.read_bytes().split(b"\n")):
        source = f"{path}, line {index + 1}"
        try:
            line = raw.decode("utf-8-sig" if index == 0 else "utf-8").strip()
            if not line:
                continue
            prompt = _prompt(json.loads(line), index) if path.suffix == ".jsonl" else Prompt(line, index)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{source}: {error}.") from None
        yield source, prompt


def _parquet_prompts(path: Path) -> Iterator[tuple[str, Prompt]]:
    """Each prompt of a parquet file, and where it stands."""
    with open_parquet(path) as file:
        columns = [field.name for field in file.schema_arrow if _json_can_say(field.type)]
        if not any(name in columns for name in PROMPT_KEYS):
            raise ValueError(f"{path} has no column of texts that is called {' or '.join(PROMPT_KEYS)}.")
        for index, row in read_rows(path, file, columns, MAX_BYTES, "beside its images: split it"):
            source = f"{path}, row {index}"
            try:
                prompt = _prompt(row, index)
            except ValueError as error:
                raise ValueError(f"{source}: {error}.") from None
            yield source, prompt


def _json_can_say(kind: Any) -> bool:
    """Whether the values of a parquet column could stand in a JSONL as well."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return all(_json_can_say(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _json_can_say(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(is_kind(kind) for is_kind in plain)


def _prompt(row: Any, index: int) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the key prompt, found {type(row).__name__}")
    text, identity = take_text(row, PROMPT_KEYS), row.pop("id", index)
    if not isinstance(identity, int | str) or isinstance(identity, bool):
        raise ValueError(f"id is {identity!r}, and must be a whole number or a text")
    return Prompt(text, identity, row)


class PromptSampler:
    """Which prompts a step sees: shuffled epochs without replacement, a pure function of (seed, step).

    An epoch has len(prompts) // num_prompts_per_step steps; the few prompts that are left over wait for another epoch's
    shuffle. So no step holds a prompt twice; prompts of one text and two ids are two, but for rewards that compare the
    samples of a text.

    Raises ValueError if a step asks for more prompts than there are.
    """

    def __init__(self, prompts: Sequence[Prompt], num_prompts_per_step: int, seed: int) -> None:
        if not 1 <= num_prompts_per_step <= len(prompts):
            raise ValueError(
                f"num_prompts_per_step = {num_prompts_per_step} with {len(prompts)} prompts: use 1 to {len(prompts)}, "
                "and group_size for more images of each."
            )
        self.prompts = list(prompts)
        self.num_prompts_per_step = num_prompts_per_step
        self.seed = seed

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of step 0, 1, 2, ..."""
        epoch, position = divmod(step, len(self.prompts) // self.num_prompts_per_step)
        order = generator(self.seed, "prompts", epoch).permutation(len(self.prompts))
        start = position * self.num_prompts_per_step
        return [self.prompts[i] for i in order[start : start + self.num_prompts_per_step]]
