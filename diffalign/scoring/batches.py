"""Decoded items in, a score or a reason for each reward out, by batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign import media
from diffalign.rewards import Reward
from diffalign.rewards.encoders import shared_features
from diffalign.scoring.cache import Cache, key, pixel_digest
from diffalign.scoring.decode import Decoded
from diffalign.scoring.items import Item, one_line

MAX_BATCH = 64
_BATCH_PIXELS = 16 * 2**20  # of a batch whose size nobody chose: 64 images of 512 pixels, 16 of 1024
_HELD_BYTES = 512 * 2**20  # of uint8 pixels that wait for others of their size

Scored = dict[str, float | str]
"""Reward name -> its score, or why there is none."""


@dataclass
class Scorer:
    """Scores chunks of items.

    The batches of a chunk follow from its items alone, so a chunk that is scored again after a kill, or by another
    process, gets the same batches and the same last bits.

    Attributes:
        rewards: each of another name.
        fingerprints: of each reward, by name; see `fingerprint`.
        cache: where scores of the same content are looked up first.
        batch_size: items at once; None: as many as make 16 Mi pixels, at most 64.
        device: where pixels go to be scored.
        hits: reward name -> scores that were known already.
    """

    rewards: Sequence[Reward]
    fingerprints: Mapping[str, str]
    cache: Cache
    batch_size: int | None = None
    device: torch.device | str = "cpu"
    hits: dict[str, int] = field(default_factory=dict)

    def score(self, items: Iterable[Decoded]) -> dict[int, Scored]:
        """Index -> scores of every (index, item, pixels) of a chunk; a failure costs its own score and no other."""
        chunk = _Chunk(self)
        for index, item, pixels in items:
            chunk.add(index, item, pixels)
        scored = chunk.finish()
        self.cache.put({address: value for (_, address), value in chunk.answers.items() if isinstance(value, float)})
        return scored

    def full(self, bucket: list[_Waiting]) -> bool:
        """Whether items of one size make a batch."""
        pixels = bucket[0].pixels
        size = self.batch_size or min(MAX_BATCH, 3 * _BATCH_PIXELS // pixels.numel())
        return len(bucket) >= size

    @torch.no_grad()
    def measure(self, reward: Reward, batch: Sequence[_Waiting], pixels: Tensor) -> list[float | str]:
        """Scores of items of one size, or why there are none."""
        score = reward(pixels, [w.item.prompt or "" for w in batch], [w.item.metadata for w in batch])
        values, valid = score.value.tolist(), score.valid.tolist()
        return [
            float(value) if ok else one_line(score.reasons.get(i, "the score failed"))
            for i, (value, ok) in enumerate(zip(values, valid, strict=True))
        ]

    def pixels(self, batch: Sequence[_Waiting]) -> Tensor:
        """Of items of one size, on the device."""
        return media.from_uint8(torch.stack([waiting.pixels for waiting in batch]).to(self.device))


@dataclass(eq=False)
class _Waiting:
    """An item with scores that are not known yet."""

    item: Item
    pixels: Tensor
    keys: dict[str, bytes]  # of the rewards that are to score it


class _Chunk:
    """The items of one part on their way."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.scored: dict[int, Scored] = {}
        self.asked: dict[tuple[str, bytes], list[int]] = {}  # (reward, content) -> who has that content
        self.answers: dict[tuple[str, bytes], float | str] = {}
        self.buckets: dict[torch.Size, list[_Waiting]] = {}

    def add(self, index: int, item: Item, pixels: Tensor | str) -> None:
        """Takes an item, and scores a batch where that makes one full."""
        self.scored[index] = {}
        if isinstance(pixels, str):
            self.scored[index] = {reward.name: pixels for reward in self.scorer.rewards}
            return
        waiting = _Waiting(item, pixels, self._unknown(index, item, pixels))
        if not waiting.keys:
            return
        bucket = self.buckets.setdefault(pixels.shape, [])
        bucket.append(waiting)
        if self.scorer.full(bucket):
            self._score(pixels.shape)
        while sum(map(_held, self.buckets.values())) > _HELD_BYTES:
            self._score(max(self.buckets, key=lambda shape: _held(self.buckets[shape])))

    def finish(self) -> dict[int, Scored]:
        """Scores what is left, and gives everything."""
        for shape in list(self.buckets):
            self._score(shape)
        for (name, address), indices in self.asked.items():
            for index in indices:
                self.scored[index][name] = self.answers[name, address]
        return self.scored

    def _unknown(self, index: int, item: Item, pixels: Tensor) -> dict[str, bytes]:
        """Reward -> key of the scores that no cache and no earlier item of the chunk gives."""
        scorer, digest, keys = self.scorer, pixel_digest(pixels), {}
        for reward in scorer.rewards:
            reason = unmet(reward, item, pixels)
            if reason:
                self.scored[index][reward.name] = reason
                continue
            address = key(digest, item, reward, scorer.fingerprints[reward.name])
            asked = self.asked.setdefault((reward.name, address), [])
            asked.append(index)
            if len(asked) == 1:
                value = scorer.cache.get(address)
                if value is None:
                    keys[reward.name] = address
                    continue
                self.answers[reward.name, address] = value
            scorer.hits[reward.name] = scorer.hits.get(reward.name, 0) + 1
        return keys

    def _score(self, shape: torch.Size) -> None:
        """A batch for each reward; those on the same items get the same tensor, by which they share features."""
        bucket, last, pixels = self.buckets.pop(shape), [], None
        with shared_features():
            for reward in self.scorer.rewards:
                batch = [waiting for waiting in bucket if reward.name in waiting.keys]
                if not batch:
                    continue
                if batch != last:
                    last, pixels = batch, self.scorer.pixels(batch)
                values = self.scorer.measure(reward, batch, pixels)
                addresses = [(reward.name, waiting.keys[reward.name]) for waiting in batch]
                self.answers.update(zip(addresses, values, strict=True))


def unmet(reward: Reward, item: Item, pixels: Tensor) -> str | None:
    """What the reward needs and the item lacks, or None."""
    kind = "image" if pixels.ndim == 3 else "video"
    if reward.media != kind:
        return f"is a{'n' if kind == 'image' else ''} {kind}, and this reward scores {reward.media}s"
    if "prompt" in reward.needs and item.prompt is None:
        return "no prompt"
    missing = [need for need in reward.needs if need != "prompt" and item.metadata.get(need) is None]
    return f"no {' and no '.join(missing)} in its metadata" if missing else None


def _held(bucket: list[_Waiting]) -> int:
    return sum(waiting.pixels.nbytes for waiting in bucket)
