"""Prompt files, and which prompts a training step sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.noise import generator
from diffalign.registry import resolve_data

_MAX_BYTES = 256 * 2**20


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
    """Reads ``.txt``, one prompt a line, or ``.jsonl``, one object a line with ``prompt`` and any metadata.

    The id of a prompt is the index of its line, counted from 0, or its key ``id`` in a ``.jsonl``. Blank lines are
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
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: prompts are read from .txt or .jsonl files, not {path.suffix or 'one without suffix'}."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes: split it.")
    read_line = _json_line if path.suffix == ".jsonl" else _text_line
    prompts: dict[int | str, Prompt] = {}
    for index, raw in enumerate(path.read_bytes().split(b"\n")):
        try:
            line = raw.decode("utf-8-sig" if index == 0 else "utf-8").strip()
            if not line:
                continue
            prompt = read_line(line, index)
            if prompt.id in prompts:
                raise ValueError(f"the id {prompt.id!r} is already taken by an earlier line")
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{path}, line {index + 1}: {error}.") from None
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return list(prompts.values())


def _text_line(line: str, index: int) -> Prompt:
    return Prompt(line, index)


def _json_line(line: str, index: int) -> Prompt:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the key prompt, found {type(row).__name__}")
    text, identity = row.pop("prompt", None), row.pop("id", index)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt is {text!r}, and must be a text that is not empty")
    if not isinstance(identity, int | str) or isinstance(identity, bool):
        raise ValueError(f"id is {identity!r}, and must be a whole number or a text")
    return Prompt(text, identity, row)


class PromptSampler:
    """Which prompts a step sees: shuffled epochs without replacement, a pure function of (seed, step).

    An epoch has len(prompts) // num_prompts_per_step steps; the few prompts that are left over wait for another epoch's
    shuffle. So no step holds a prompt twice, and groups stay apart.

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
