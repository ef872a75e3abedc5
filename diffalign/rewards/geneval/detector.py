"""Objects in images, by an instance segmentation or object detection network of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign._compat import ensure_torchvision
from diffalign.media import to_pil
from diffalign.rewards.geneval.rules import THRESHOLD, Found
from diffalign.rewards.networks import load_network, load_processor

# COCO's names, in their spellings, as GenEval calls them.
_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


class InstanceDetector:
    """Detections above 0.3 of a Mask2Former (Cheng et al. 2022, arXiv:2112.01527) or its kin, or of a box detector.

    Of an instance segmentation network each pair of query and class is a detection: its score is the class's
    probability times the mean probability inside the mask, its box the extent of the mask, and masks may overlap, as in
    mmdetection. Masks are interpolated once, from the network's to the image's size.

    Args:
        path: a folder or hub id of an `AutoModelForUniversalSegmentation` for instances, or, if its configuration
            names such a class, of an `AutoModelForObjectDetection`, whose boxes have no masks.
        revision: of the hub repository.

    Attributes:
        names: of the classes it knows, as GenEval calls those of COCO.
    """

    def __init__(self, path: str | Path, *, revision: str | None = None) -> None:
        ensure_torchvision()
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(path), revision=revision)
        boxes = any(each.endswith("ForObjectDetection") for each in config.architectures or ())
        kind = "AutoModelForObjectDetection" if boxes else "AutoModelForUniversalSegmentation"
        self.has_masks = not boxes
        self.label = Path(path).name
        self.model = load_network(kind, str(path), revision)
        self.processor = load_processor(str(path), revision)
        self.names = {index: _NAMES.get(name, name) for index, name in self.model.config.id2label.items()}

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Found]]:
        """The detections in each of the images (B, 3, H, W) in [0, 1], seen with 8 bits."""
        size, device = (images.shape[-2], images.shape[-1]), self.model.device
        seen = self.processor(to_pil(images), return_tensors="pt").to(device)
        with torch.autocast(device.type, enabled=False):
            output = self.model(**seen)
        if not self.has_masks:
            found = self.processor.post_process_object_detection(output, THRESHOLD, [size] * len(images))
            return [self._from_boxes(each) for each in found]
        logits = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        return [self._from_masks(*each, size) for each in logits]

    def _from_boxes(self, found: dict[str, Tensor]) -> list[Found]:
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Found(self.names[label], score, tuple(box)) for label, score, box in rows]

    def _from_masks(self, classes: Tensor, masks: Tensor, size: tuple[int, int]) -> list[Found]:
        """From logits (Q, K + 1), the last class being none, and (Q, h, w)."""
        likely = classes.softmax(dim=-1)[:, :-1]
        found = []
        for query, label in (likely > THRESHOLD).nonzero().tolist():  # the mask's part can only lower a score
            mask = interpolate(masks[None, query : query + 1], size, mode="bilinear", align_corners=False)[0, 0]
            inside = mask > 0
            if not inside.any():
                continue
            score = float(likely[query, label] * mask.sigmoid()[inside].mean())
            if score > THRESHOLD:
                found.append(Found(self.names[label], score, extent(inside), inside))
        return found


def extent(mask: Tensor) -> tuple[float, float, float, float]:
    """The tight box (left, top, right, bottom) of a mask (H, W) that is not empty; right and bottom lie outside."""
    rows, columns = (mask.any(dim=dim).nonzero().flatten() for dim in (1, 0))
    edges: tuple[Any, ...] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = (float(edge) for edge in edges)
    return left, top, right, bottom
