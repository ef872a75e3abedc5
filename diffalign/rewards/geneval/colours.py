"""The colours of detected objects, by CLIP on what is inside of their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.geneval.rules import COLOURS, Found

_GROUND = 0x99 / 255
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Colours:
    """Zero-shot classification by CLIP into GenEval's ten colours.

    An object is cut out along its box, with grey (#999) where its mask is not. A colour's embedding is the mean of
    those of three captions, which is what CLIP's authors do for classes.

    Args:
        encoder: of images and text; GenEval's is OpenAI's ViT-L/14.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def __call__(self, image: Tensor, objects: Sequence[Found], name: str) -> list[str]:
        """The colour of each of the objects of class ``name`` in an image (3, H, W) in [0, 1]."""
        names = self._embeddings(name)
        # one by one: cuttings differ in size, and a colour must not depend on the others
        seen = [self.encoder.image_features(cutting(image, each)[None])[0] for each in objects]
        return [COLOURS[int((names @ each).argmax())] for each in seen]

    def _embeddings(self, name: str) -> Tensor:
        """Unit embeddings (10, D) of the colours of a class."""
        captions = [t.format(colour=colour, name=name) for colour in COLOURS for t in _TEMPLATES]
        means = self.encoder.text_features(captions).unflatten(0, (len(COLOURS), len(_TEMPLATES))).mean(dim=1)
        return means / means.norm(dim=-1, keepdim=True)


def cutting(image: Tensor, found: Found) -> Tensor:
    """The part (3, h, w) of an image (3, H, W) inside of a box, of at least one pixel, grey where the mask is not."""
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, _GROUND)
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
