"""Preference pairs as lists beside image files: JSONL with a pair a line, and HPDv2's JSON of compared images."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, TypeGuard

from diffalign.data.pair import SIDES, Pair
from diffalign.data.prompts import Prompt
from diffalign.data.rows import PROMPT_KEYS, line_object, take_text
from diffalign.registry import leads_out

MAX_JSON_BYTES = 2**30  # a JSON is read whole; the train split of HPDv2 has some 645,000 comparisons
MAX_PAIRS = 2**22  # of a JSON; every two images of an entry are one, so that few bytes can ask for many


def jsonl_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a JSONL; FileNotFoundError and ValueError name the line."""
    seen: set[int | str] = set()
    with path.open("rb") as file:
        for index, raw in enumerate(file):
            source = f"{path}, line {index + 1}"
            try:
                row = line_object(raw, index == 0, "prompt, chosen and rejected")
                if row is None:
                    continue
                identity, text = row.pop("id", index), take_text(row, PROMPT_KEYS)
                # an imagefolder says `chosen_file_name` for what it then has as `chosen`
                chosen, rejected = (path.parent / take_text(row, (side, f"{side}_file_name")) for side in SIDES)
                if not isinstance(identity, int | str) or isinstance(identity, bool) or identity in seen:
                    raise ValueError(f"id is {identity!r}, and must be a whole number or a text that no other line has")
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise ValueError(f"{source}: {error}.") from None
            for image in (chosen, rejected):
                if not os.path.isfile(image):  # and not `is_file`, which raises for a name that is too long
                    raise FileNotFoundError(
                        f"{source}: {image} does not exist: paths start from the file's own folder."
                    )
            seen.add(identity)
            yield Pair(Prompt(text, identity, row), chosen, rejected, source)


def hpd_pairs(path: Path) -> tuple[list[Pair], int]:
    """The pairs of a JSON of HPDv2, and how many are ties; FileNotFoundError and ValueError name the entry."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES:,} bytes: split it.")
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list with an object for each prompt, as HPDv2's train.json does.")
    pairs, ties, compared = [], 0, 0
    for number, entry in enumerate(entries):
        source = f"{path}, entry {number}"
        try:
            text, names, ranks = _hpd_entry(entry)
        except ValueError as error:
            raise ValueError(f"{source}: {error}.") from None
        compared += math.comb(len(names), 2)
        if compared > MAX_PAIRS:
            raise ValueError(f"{source}: with it there are more than {MAX_PAIRS:,} pairs of images: split the file.")
        images = [_hpd_image(path, name, source) for name in names]
        for i, j in combinations(range(len(images)), 2):
            if ranks[i] == ranks[j]:
                ties += 1
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            identity = number if len(images) == 2 else f"{number}/{better}-{worse}"
            pairs.append(Pair(Prompt(text, identity), images[better], images[worse], source))
    return pairs, ties


def _hpd_entry(entry: Any) -> tuple[str, list[str], list[float]]:
    """(prompt, names, ranks) of an entry; the lowest rank is the best."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with prompt, image_path and a choice, found {type(entry).__name__}")
    text = take_text(entry, PROMPT_KEYS)
    key = "file_path" if "file_path" in entry else "image_path"
    names = entry.get(key)
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key} is {names!r}, and must be a list of two or more file names")
    leaving = [name for name in names if leads_out(name)]
    if leaving:
        raise ValueError(f"{key} has {leaving[0]!r}, which leads out of the folder of the images: name files below it")
    key = "rank" if "rank" in entry else "human_preference"
    choice = entry.get(key)
    if not _are_numbers(choice) or len(choice) != len(names):
        raise ValueError(f"{key} is {choice!r}, and must be a list with a number for each of the {len(names)} images")
    return text, names, choice if key == "rank" else [-c for c in choice]


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    # `math.isfinite` raises for whole numbers that no float can hold.
    return isinstance(values, list) and all(isinstance(v, int | float) and -math.inf < v < math.inf for v in values)


def _hpd_image(path: Path, name: str, source: str) -> Path:
    """Images of train.json are in train, beside it or, as in copies of it, in its own folder."""
    places = [path.parent / path.stem / name, path.parent / name]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        raise FileNotFoundError(f"{source}: neither {places[0]} nor {places[1]} exists: unpack the images there.")
    return found
