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
from diffalign.scoring.groups import Groups, Sample
from diffalign.scoring.items import Item, one_line
from diffalign.scoring.references import References, file_keys

MAX_BATCH = 64
_BATCH_PIXELS = 16 * 2**20  # of a batch whose size nobody chose: 64 images of 512 pixels, 16 of 1024
_HELD_BYTES = 512 * 2**20  # of uint8 pixels that wait for others of their size

Scored = dict[str, float | str]
"""Reward name -> its score, or why there is none."""


@dataclass
class Scorer:
    """Scores chunks of items.

    The batches of a chunk follow from its items alone, so a chunk that is scored again after a kill, or by another
    process, gets the same batches and the same last bits. A reward of groups gets the samples of a prompt as one batch.

    Attributes:
        rewards: each of another name.
        fingerprints: of each reward, by name; see `fingerprint`.
        cache: where scores of the same content are looked up first.
        batch_size: items at once, but in groups; None: as many as make 16 Mi pixels, at most 64.
        device: where pixels go to be scored.
        hits: reward name -> scores that were known already.
        references: the files that the metadata of the chunk's items names.
    """

    rewards: Sequence[Reward]
    fingerprints: Mapping[str, str]
    cache: Cache
    batch_size: int | None = None
    device: torch.device | str = "cpu"
    hits: dict[str, int] = field(default_factory=dict)
    references: References = field(default_factory=References)

    def score(self, items: Iterable[Decoded]) -> dict[int, Scored]:
        """Index -> scores of every (index, item, pixels) of a chunk; a failure costs its own score and no other.

        For rewards of groups the items of a prompt follow each other, and all of them are in the chunk.
        """
        chunk = _Chunk(self)
        try:
            for index, item, pixels in items:
                chunk.add(index, item, pixels)
            scored = chunk.finish()
        finally:
            self.references.clear()
        self.cache.put(chunk.known())
        return scored

    def full(self, bucket: list[Sample]) -> bool:
        """Whether items of one size make a batch."""
        pixels = bucket[0].pixels
        size = self.batch_size or min(MAX_BATCH, 3 * _BATCH_PIXELS // pixels.numel())
        return len(bucket) >= size

    @torch.no_grad()
    def measure(self, reward: Reward, batch: Sequence[Sample], pixels: Tensor) -> list[float | str]:
        """Scores of items of one size, or why there are none."""
        files = file_keys(reward)
        metadata = [self.references.metadata(sample.item, files) for sample in batch]
        score = reward(pixels, [sample.item.prompt or "" for sample in batch], metadata)
        values, valid = score.value.tolist(), score.valid.tolist()
        return [
            float(value) if ok else one_line(self.references.named(score.reasons.get(i, "the score failed")))
            for i, (value, ok) in enumerate(zip(values, valid, strict=True))
        ]

    def pixels(self, batch: Sequence[Sample]) -> Tensor:
        """Of items of one size, on the device."""
        return media.from_uint8(torch.stack([sample.pixels for sample in batch]).to(self.device))


class _Chunk:
    """The items of one part on their way."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.scored: dict[int, Scored] = {}
        self.asked: dict[tuple[str, bytes], list[int]] = {}  # (reward, content) -> who has that content
        self.answers: dict[tuple[str, bytes], float | str] = {}
        self.buckets: dict[torch.Size, list[Sample]] = {}
        self.groups = Groups(scorer)

    def add(self, index: int, item: Item, pixels: Tensor | str) -> None:
        """Takes an item, and scores a batch where that makes one full."""
        self.scored[index] = {}
        if isinstance(pixels, str):
            self.scored[index] = {reward.name: pixels for reward in self.scorer.rewards}
            return
        alone, together = self._keys(index, item, pixels)
        if together:
            self.groups.add(Sample(index, item, pixels, together))
        unknown = self._unknown(index, alone)
        if not unknown:
            return
        bucket = self.buckets.setdefault(pixels.shape, [])
        bucket.append(Sample(index, item, pixels, unknown))
        if self.scorer.full(bucket):
            self._score(pixels.shape)
        while sum(map(_held, self.buckets.values())) > _HELD_BYTES:
            self._score(max(self.buckets, key=lambda shape: _held(self.buckets[shape])))

    def finish(self) -> dict[int, Scored]:
        """Scores what is left, and gives everything."""
        for shape in list(self.buckets):
            self._score(shape)
        self.groups.finish()
        for (index, name), answer in self.groups.scored.items():
            self.scored[index][name] = answer
        for (name, address), indices in self.asked.items():
            for index in indices:
                self.scored[index][name] = self.answers[name, address]
        return self.scored

    def known(self) -> dict[bytes, float]:
        """Key -> score, for the cache."""
        alone = {address: value for (_, address), value in self.answers.items() if isinstance(value, float)}
        return alone | self.groups.known

    def _keys(self, index: int, item: Item, pixels: Tensor) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Reward -> key of what it sees: of those that score the item alone, and of those that compare it."""
        scorer, digest = self.scorer, pixel_digest(pixels)
        alone, together = {}, {}
        for reward in scorer.rewards:
            name, reason = reward.name, unmet(reward, item, pixels)
            files = reason or scorer.references.digests(item, file_keys(reward))
            if isinstance(files, str):
                self.scored[index][name] = files
                continue
            keys = together if reward.groupwise else alone
            keys[name] = key(digest, item, reward, scorer.fingerprints[name], files)
        return alone, together

    def _unknown(self, index: int, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Of the keys those whose scores no cache and no earlier item of the chunk gives."""
        scorer, unknown = self.scorer, {}
        for name, address in keys.items():
            asked = self.asked.setdefault((name, address), [])
            asked.append(index)
            if len(asked) == 1:
                value = scorer.cache.get(address)
                if value is None:
                    unknown[name] = address
                    continue
                self.answers[name, address] = value
            scorer.hits[name] = scorer.hits.get(name, 0) + 1
        return unknown

    def _score(self, shape: torch.Size) -> None:
        """A batch for each reward; those on the same items get the same tensor, by which they share features."""
        bucket, last, pixels = self.buckets.pop(shape), [], None
        with shared_features():
            for reward in self.scorer.rewards:
                batch = [sample for sample in bucket if reward.name in sample.keys]
                if not batch:
                    continue
                if batch != last:
                    last, pixels = batch, self.scorer.pixels(batch)
                values = self.scorer.measure(reward, batch, pixels)
                addresses = [(reward.name, sample.keys[reward.name]) for sample in batch]
                self.answers.update(zip(addresses, values, strict=True))


def unmet(reward: Reward, item: Item, pixels: Tensor) -> str | None:
    """What the reward needs and the item lacks, or None."""
    kind = "image" if pixels.ndim == 3 else "video"
    if reward.media != kind:
        return f"is a{'n' if kind == 'image' else ''} {kind}, and this reward scores {reward.media}s"
    if reward.groupwise and item.prompt is None:
        return "no prompt, and this reward compares the samples of a prompt"
    if "prompt" in reward.needs and item.prompt is None:
        return "no prompt"
    missing = [need for need in reward.needs if need != "prompt" and item.metadata.get(need) is None]
    return f"no {' and no '.join(missing)} in its metadata" if missing else None


def _held(bucket: list[Sample]) -> int:
    return sum(sample.pixels.nbytes for sample in bucket)
