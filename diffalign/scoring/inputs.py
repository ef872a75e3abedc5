"""From what the user named to the list of items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from diffalign.registry import resolve_data
from diffalign.scoring.archive import tar_items
from diffalign.scoring.items import Item, file_item, folder_items, sidecar
from diffalign.scoring.lists import list_items
from diffalign.scoring.request import Request


def read_inputs(request: Request) -> list[Item]:
    """Every item of the request, in order; nothing but lists and sidecars is opened.

    Raises:
        ValueError: there is nothing to score, or the prompts are not as many as the items.
    """
    items = [item for path in request.inputs for item in _items(path, request.prompt_column)]
    if not items:
        raise ValueError(f"nothing to score in {', '.join(map(str, request.inputs))}: no image or video is there.")
    return items if request.prompts is None else _with_prompts(items, request.prompts)


def _items(path: Path, prompt_column: str | None) -> Iterator[Item]:
    if path.is_dir():
        return folder_items(path)
    suffix = path.suffix.casefold()
    if suffix in (".csv", ".jsonl", ".parquet"):
        return list_items(path, prompt_column)
    return tar_items(path) if suffix == ".tar" else iter([file_item(path, *sidecar(path))])


def _with_prompts(items: list[Item], file: str | Path) -> list[Item]:
    """The prompts of a file in the place of each item's own: one for each in order, or one for all."""
    from diffalign.data import read_prompts

    prompts = read_prompts(file)
    if len(prompts) == 1:
        prompts = prompts * len(items)
    if len(prompts) != len(items):
        raise ValueError(
            f"{file} holds {len(prompts):,} prompts for {len(items):,} items: give one for each, in the order of the "
            "items, or a single one for all."
        )
    folder = resolve_data(file, relative_to=Path()).parent
    return [
        replace(
            item,
            prompt=prompt.text,
            metadata=item.metadata | prompt.metadata,
            folders=dict.fromkeys(prompt.metadata, folder),
        )
        for item, prompt in zip(items, prompts, strict=True)
    ]
