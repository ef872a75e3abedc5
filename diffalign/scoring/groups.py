"""The samples of one prompt, which some rewards compare with each other: one prompt after another, each whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.rewards import Reward
from diffalign.scoring.items import Item

if TYPE_CHECKING:
    from diffalign.scoring.batches import Scorer

MAX_GROUP = 1024  # samples; a pairwise judge is asked of a group by its square
MAX_GROUP_BYTES = 512 * 2**20  # of uint8 pixels, which are held until the group is whole


@dataclass(eq=False)
class Sample:
    """An item with scores that are not known yet.

    Attributes:
        index: of its row.
        item: what it is.
        pixels: (3, H, W) uint8, of a video (F, 3, H, W).
        keys: reward -> what it sees of the item, of the rewards that are to score it; see `cache.key`.
    """

    index: int
    item: Item
    pixels: Tensor
    keys: dict[str, bytes]


class Groups:
    """Scores of rewards that compare the samples of a prompt.

    A sample that cannot be scored is not in its group: the others are compared without it. The group is scored in the
    order of its contents, so that scores follow from what their keys cover and not from where the files lie.

    Args:
        scorer: the rewards, and where scores are looked up.

    Attributes:
        scored: (index, reward) -> its score, or why there is none.
        known: key -> score, for the cache.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.scored: dict[tuple[int, str], float | str] = {}
        self.known: dict[bytes, float] = {}
        self._samples: list[Sample] = []
        self._bytes = 0

    def add(self, sample: Sample) -> None:
        """Takes a sample. The samples of a prompt follow each other: with another prompt the group is whole."""
        if self._samples and self._samples[-1].item.prompt != sample.item.prompt:
            self.finish()
        known_as_too_large = self._too_large()
        self._samples.append(sample)
        self._bytes += sample.pixels.nbytes
        if self._too_large():  # nobody will look at the pixels
            for each in [sample] if known_as_too_large else self._samples:
                each.pixels = torch.empty(0, dtype=torch.uint8)

    def finish(self) -> None:
        """Scores the last group."""
        for reward in self.scorer.rewards:
            samples = [sample for sample in self._samples if reward.name in sample.keys]
            if samples:
                self._score(reward, sorted(samples, key=lambda sample: sample.keys[reward.name]))
        self._samples, self._bytes = [], 0

    def _too_large(self) -> bool:
        return len(self._samples) > MAX_GROUP or self._bytes > MAX_GROUP_BYTES

    def _score(self, reward: Reward, samples: Sequence[Sample]) -> None:
        scorer, name = self.scorer, reward.name
        contents = sha256(b"".join(sample.keys[name] for sample in samples)).digest()
        addresses = [sha256(contents + sample.keys[name]).digest() for sample in samples]
        kept = [value for address in addresses if (value := scorer.cache.get(address)) is not None]
        if len(kept) == len(samples):
            scorer.hits[name] = scorer.hits.get(name, 0) + len(samples)
            values = kept
        else:
            values = self._compared(reward, samples)
        answers = dict(zip(addresses, values, strict=True))  # equal samples have one score, as the cache gives it
        floats = {address: value for address, value in answers.items() if isinstance(value, float)}
        if len(floats) == len(answers):  # a failure that passes would leave scores of two different groups
            self.known |= floats
        self.scored |= {(s.index, name): answers[address] for s, address in zip(samples, addresses, strict=True)}

    def _compared(self, reward: Reward, samples: Sequence[Sample]) -> list[float | str]:
        sizes = {sample.pixels.shape for sample in samples}
        reason = None
        if self._too_large():
            reason = (
                f"its prompt has more samples than are compared with each other: at most {MAX_GROUP:,}, "
                f"of {MAX_GROUP_BYTES // 2**20} MiB"
            )
        elif len(sizes) > 1:
            reason = f"the samples of its prompt have {len(sizes)} sizes, and only those of one size are compared"
        if reason:
            return [reason] * len(samples)
        return self.scorer.measure(reward, samples, self.scorer.pixels(samples))
