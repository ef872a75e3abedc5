"""GenEval as a reward: a detector, CLIP for colours, and the rules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.encoders import DualEncoder, load_encoder
from diffalign.rewards.geneval.colours import Colours
from diffalign.rewards.geneval.detector import InstanceDetector
from diffalign.rewards.geneval.rules import is_correct, read_clauses, share_met, sort_out


class GenEval(Reward):
    """The share of what a prompt asks for that is there, in [0, 1], or GenEval's verdict, 0 or 1. Not differentiable.

    Ghosh et al. (2023), arXiv:2310.11513, whose verdict is `is_correct`; the share, `share_met`, is after Flow-GRPO
    (Liu et al. 2025, arXiv:2505.05470), and says where it departs. Metadata are those of GenEval's JSONL: ``include``
    and ``exclude`` are lists of ``{"class", "count", "color", "position"}``, and the ``tag`` "counting" asks for
    detections above 0.9 in place of 0.3. The overall score of the benchmark is the mean, over its six tags, of the mean
    verdict of four images a prompt. An image in which nothing is found has a score; a class that the detector does not
    know is a failed score.

    A departure: the detector is one of transformers, and not mmdetection's Mask2Former, from other weights; published
    numbers are not to be compared with before both agree on the same images.

    Args:
        detector: a folder or hub id, or a detector.
        clip: a folder or hub id of the CLIP that tells colours, or an encoder.
        strict: the verdict, and not the share.
        name: its column in metrics.
    """

    needs = ("include",)
    optional = ("exclude", "tag")

    def __init__(
        self,
        detector: str | Path | InstanceDetector,
        clip: str | Path | DualEncoder,
        *,
        strict: bool = False,
        name: str = "geneval",
    ) -> None:
        self.detector = detector if isinstance(detector, InstanceDetector) else InstanceDetector(detector)
        self.colours = Colours(clip if isinstance(clip, DualEncoder) else load_encoder(clip))
        self.strict = strict
        self.name = name

    def to(self, device: torch.device | str) -> Self:
        """Moves the detector and the encoder."""
        self.detector.to(device)
        self.colours.encoder.to(device)
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Shares or verdicts (B,) float32."""
        for entry in metadata:
            self._check(entry)
        judge, scores = is_correct if self.strict else share_met, []
        for image, detections, entry in zip(images, self.detector(images), metadata, strict=True):
            objects = sort_out(detections, counting=entry.get("tag") == "counting")
            scores.append(float(judge(objects, entry, partial(self.colours, image))))
        return images.new_tensor(scores, dtype=torch.float32)

    def _check(self, metadata: Mapping[str, Any]) -> None:
        """ValueError: no clause, a wrong one, or a class that is never detected."""
        clauses = read_clauses(metadata, "include")
        if not clauses:
            raise ValueError("include is empty: name at least one class and count")
        known = set(self.detector.names.values())
        for clause in [*clauses, *read_clauses(metadata, "exclude")]:
            if clause.name not in known:
                raise ValueError(f"{self.detector.label} detects no {clause.name!r}: name one of its id2label")
