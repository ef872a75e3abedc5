"""GenEval's rules on detections, without any network: what counts as there, where, and what a clause asks for.

Ghosh et al. (2023), arXiv:2310.11513; Flow-GRPO, Liu et al. (2025), arXiv:2505.05470. Both codes were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # of prompts that count, where one object seen twice is an error
MOST_OBJECTS = 16  # of a class
MARGIN = 0.1  # of the objects' sizes, that they may be apart and still be level
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Found:
    """A detection: class, score, box (left, top, right, bottom) in pixels, and mask (H, W) where there is one."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Clause:
    """What is asked for: so many objects of a class, of a colour, each in a relation to those of an earlier clause."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


Objects = Mapping[str, Sequence[Found]]
ColourReader = Callable[[Sequence[Found], str], list[str]]
"""(objects of one class, the class) -> the colour of each."""


def sort_out(detections: Sequence[Found], counting: bool) -> dict[str, list[Found]]:
    """The detections that count, by class and falling score: above the threshold, at most 16 of a class.

    GenEval can suppress overlapping boxes too, but does not as published: its maximal overlap is 1.
    """
    threshold = COUNTING_THRESHOLD if counting else THRESHOLD
    objects: dict[str, list[Found]] = {}
    for each in sorted(detections, key=lambda found: -found.score):
        kept = objects.setdefault(each.name, []) if each.score > threshold else []
        if len(kept) < MOST_OBJECTS:
            kept.append(each)
    return objects


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box is relative to another: of "left of", "right of", "above" and "below", none, one or two.

    The offset of the centres is shortened, along each axis, by a tenth of the sum of both sizes; an axis counts where
    what is left of it exceeds half of the whole offset's length.
    """
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        between = (box[low] + box[high] - other[low] - other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offset.append(between)
        shortened.append(math.copysign(max(abs(between) - MARGIN * sizes, 0.0), between))
    if max(map(abs, shortened)) < 1e-3:
        return set()
    length = math.hypot(*offset)
    right, down = (each / length for each in shortened)
    told = (right < -0.5, right > 0.5, down < -0.5, down > 0.5)
    return {relation for relation, holds in zip(RELATIONS, told, strict=True) if holds}


def read_clauses(metadata: Mapping[str, Any], key: str) -> list[Clause]:
    """The clauses of ``include`` or ``exclude``, as in GenEval's JSONL. ValueError: one asks for what there is not."""
    told = metadata.get(key) or []
    if not isinstance(told, list | tuple) or not all(isinstance(each, Mapping) for each in told):
        raise ValueError(f"{key} is {str(told)[:80]!r}, and must be a list of objects with class and count")
    return [_clause(each, index, f"{key}[{index}]") for index, each in enumerate(told)]


def _clause(told: Mapping[str, Any], index: int, place: str) -> Clause:
    name, count, colour, position = (told.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{place} has class {name!r} and count {count!r}: a name, and a number of at least 1")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{place} has color {colour!r}: GenEval knows {', '.join(COLOURS)}")
    if position is None:
        return Clause(name, count, colour)
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{place} has position {position!r}: one of {', '.join(RELATIONS)}, and a clause's number")
    if position[1] not in range(index):
        raise ValueError(f"{place} has position {position!r}: the number is that of an earlier clause, from 0")
    return Clause(name, count, colour, (position[0], int(position[1])))


def is_correct(objects: Objects, metadata: Mapping[str, Any], colours_of: ColourReader) -> bool:
    """GenEval's own verdict: every ``include`` is met by the likeliest objects of its class, and no ``exclude`` is.

    More objects than asked for are no error, unless ``exclude`` says so. An object in relation to a clause that is not
    met is wrong.
    """
    groups: list[Sequence[Found] | None] = []
    for clause in read_clauses(metadata, "include"):
        group = list(objects.get(clause.name, ()))[: clause.count]
        met = (
            len(group) == clause.count
            and (clause.colour is None or colours_of(group, clause.name).count(clause.colour) == clause.count)
            and (clause.position is None or _placed(group, clause.position, groups))
        )
        groups.append(group if met else None)
    excluded = read_clauses(metadata, "exclude")
    return None not in groups and not any(len(objects.get(each.name, ())) >= each.count for each in excluded)


def share_met(objects: Objects, metadata: Mapping[str, Any], colours_of: ColourReader) -> float:
    """The mean over all that is asked for of how far it is met, in [0, 1]; after Flow-GRPO's reward.

    Each clause of ``include`` is one term for its number, 1 - |asked - found| / asked; one for its colour, if it has
    one, (objects of that colour) / asked; one for its position, 1 or 0. Colour and position are 0 where the number is
    wrong, and position also where the colour is, or where the clause that it refers to is not met. The number is to be
    exact, so that an ``exclude`` of the same class says nothing more; one of another class is a term, 1 or 0.

    Departures from Flow-GRPO's code: there a wrong position gives the terms 0 and 1, so that it counts half; a number
    that is off by more than was asked for gives less than 0; an unmet clause may have fewer terms than a met one, so
    that the others weigh more; and ``exclude`` is never read.
    """
    terms: list[float] = []
    groups: list[Sequence[Found] | None] = []
    included = read_clauses(metadata, "include")
    for clause in included:
        group = objects.get(clause.name, ())
        terms.append(max(0.0, 1 - abs(clause.count - len(group)) / clause.count))
        met = len(group) == clause.count
        if clause.colour is not None:
            right = colours_of(group, clause.name).count(clause.colour) if met else 0
            terms.append(right / clause.count)
            met = right == clause.count
        if clause.position is not None:
            met = met and _placed(group, clause.position, groups)
            terms.append(float(met))
        groups.append(group if met else None)
    counted = {clause.name for clause in included}
    others = [each for each in read_clauses(metadata, "exclude") if each.name not in counted]
    terms += [float(len(objects.get(each.name, ())) < each.count) for each in others]
    return sum(terms) / len(terms)


def _placed(group: Sequence[Found], position: tuple[str, int], groups: Sequence[Sequence[Found] | None]) -> bool:
    """Whether each object of the group is in the relation to each of an earlier group, which was met."""
    relation, number = position
    target = groups[number]
    return target is not None and all(relation in relations(a.box, b.box) for a in group for b in target)
