"""The shapes world: what a scene is, the caption that says it, and the splits that keep some combinations unseen."""

import itertools
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Split = Literal["train", "validation", "test"]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclass(frozen=True, order=True)
class Thing:
    """One object. A medium size is not said in the caption, so a caption without a size is true of any size."""

    color: str
    shape: str
    size: str = "medium"

    @property
    def phrase(self) -> str:
        """For example `a large yellow star`."""
        words = [self.color, self.shape] if self.size == "medium" else [self.size, self.color, self.shape]
        return f"{_article(words[0])} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """One object, or two of different colours where `things[0]` stands `relation` `things[1]`."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """For example `a small red circle left of a blue star`."""
        return f" {self.relation} ".join(thing.phrase for thing in self.things)


def parse(caption: str) -> Scene:
    """The scene that `caption` says; raises ValueError for anything outside the grammar."""
    for relation in RELATIONS:
        head, found, tail = caption.partition(f" {relation} ")
        if found:
            things = (_parse_thing(head, caption), _parse_thing(tail, caption))
            if things[0].color == things[1].color:
                raise ValueError(f"two objects of one colour are not in the shapes world: '{caption}'")
            return Scene(things, relation)
    return Scene((_parse_thing(caption, caption),))


def _parse_thing(phrase: str, caption: str) -> Thing:
    match phrase.split(" "):
        case ["a" | "an", color, shape] if color in COLORS and shape in SHAPES:
            return Thing(color, shape)
        case ["a" | "an", ("small" | "large") as size, color, shape] if color in COLORS and shape in SHAPES:
            return Thing(color, shape, size)
    raise ValueError(f"'{phrase}' in '{caption}' is not 'a [small | large] COLOUR SHAPE'")


def mirrored(scene: Scene) -> Scene:
    """The same picture said from the other object's side."""
    assert scene.relation is not None
    return Scene(scene.things[::-1], INVERSE[scene.relation])


def say(scene: Scene, rng: np.random.Generator) -> str:
    """The caption, from either object's side."""
    return (mirrored(scene) if scene.relation and rng.random() < 0.5 else scene).caption


def one_edit(scene: Scene) -> dict[str, list[Scene]]:
    """Every scene that differs from `scene` in one fact, by the kind of fact.

    Kinds: `color`, `shape`, `size`, and for two objects `relation` (the opposite one, so that the picture is the
    exchange of the two places) and `swap` (the two objects trade their colours, each keeps shape, size and place).
    """
    edits: dict[str, list[Scene]] = {"color": [], "shape": [], "size": []}
    taken = {thing.color for thing in scene.things}
    for i, thing in enumerate(scene.things):
        changed = {
            "color": [Thing(c, thing.shape, thing.size) for c in COLORS if c not in taken],
            "shape": [Thing(thing.color, s, thing.size) for s in SHAPES if s != thing.shape],
            "size": [Thing(thing.color, thing.shape, s) for s in SIZES if s != thing.size],
        }
        for kind, things in changed.items():
            edits[kind] += [Scene((*scene.things[:i], t, *scene.things[i + 1 :]), scene.relation) for t in things]
    if scene.relation is not None:
        a, b = scene.things
        edits["relation"] = [Scene((a, b), other) for other in RELATIONS if other != scene.relation]
        if a.shape != b.shape:
            edits["swap"] = [Scene((Thing(b.color, a.shape, a.size), Thing(a.color, b.shape, b.size)), scene.relation)]
    return edits


Pair = tuple[tuple[str, str], tuple[str, str]]


def pair_of(scene: Scene) -> Pair:
    """The unordered (colour, shape) pair of a scene of two objects: what the splits hold out."""
    a, b = sorted((thing.color, thing.shape) for thing in scene.things)
    return a, b


def _deal(items: list, validation: int, test: int) -> dict[Split, list]:
    """Shuffle once, with a fixed seed, and cut."""
    random.Random(0).shuffle(items)
    return {
        "validation": items[:validation],
        "test": items[validation : validation + test],
        "train": items[validation + test :],
    }


_KINDS = list(itertools.product(COLORS, SHAPES))
_PAIRS = [pair for pair in itertools.combinations(sorted(_KINDS), 2) if pair[0][0] != pair[1][0]]
PAIRS: dict[Split, list[Pair]] = _deal(_PAIRS, validation=24, test=36)
"""The 240 unordered pairs of (colour, shape) with two colours: 180 train, 24 validation, 36 test."""
SINGLES: dict[Split, list[Thing]] = _deal([Thing(c, s, z) for c, s in _KINDS for z in SIZES], validation=8, test=16)
"""The 72 scenes of one object: 48 train, 8 validation, 16 test."""


def split_of(scene: Scene) -> Split:
    """The only split in which `scene` may occur."""
    if scene.relation is None:
        return next(name for name, things in SINGLES.items() if scene.things[0] in things)
    return next(name for name, pairs in PAIRS.items() if pair_of(scene) in pairs)


def sample_scene(rng: np.random.Generator, split: Split, objects: int | None = None) -> Scene:
    """A random scene of `split`; one object in 30 % unless `objects` says how many."""
    if objects is None:
        objects = 1 if rng.random() < 0.3 else 2
    if objects == 1:
        return Scene((SINGLES[split][rng.integers(len(SINGLES[split]))],))
    pair = PAIRS[split][rng.integers(len(PAIRS[split]))]
    # A size is said of every third object, so that most captions stay short.
    sizes = rng.choice(SIZES, size=2, p=(0.17, 0.66, 0.17))
    things = [Thing(*kind, str(size)) for kind, size in zip(pair, sizes, strict=True)]
    if rng.random() < 0.5:
        things.reverse()
    return Scene(tuple(things), RELATIONS[rng.integers(4)])
