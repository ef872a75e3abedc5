"""An encoder of images and of text into one space: prompts are kept, and features shared by rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.preprocessing import ClipPreprocessing
from diffalign.rewards.prompts import PromptCache, PromptReader

_shared: ContextVar[dict[tuple, tuple[Tensor, Tensor]] | None] = ContextVar("shared_features", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within the context each encoder computes the features of one batch of images once, for all rewards on it."""
    if _shared.get() is not None:
        yield
        return
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def shared(owner: object, seen: Tensor, facts: tuple, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` makes of a tensor; within `shared_features` made once for equal owner, tensor and facts.

    The tensor is told by where it lies, so that equal parts of one batch are the same. It is kept too: while it lives,
    nothing else has its place. Features without a graph are not taken for those with one.
    """
    kept = _shared.get()
    if kept is None:
        return compute()
    place = (seen.data_ptr(), seen.shape, seen.stride(), seen.dtype, seen._version)
    key = (id(owner), place, facts, torch.is_grad_enabled(), seen.requires_grad)
    if key not in kept:
        kept[key] = (seen, compute())
    return kept[key][1]


class DualEncoder(PromptReader):
    """Unit embeddings of images and of prompts.

    Prompts are encoded once and kept, each on its own: its last bits must not depend on the batch that it first came
    in, nor on a resume. What is past the token limit is cut off, keeping the end token, and counted.

    Attributes:
        label: what warnings call it.
        preprocessing: from pixels in [0, 1] to what the network reads.
    """

    label: str
    preprocessing: ClipPreprocessing
    model: Any

    def __init__(self) -> None:
        self._text: PromptCache[Tensor] = PromptCache()

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""
        self.model.to(device)
        self._text.clear()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def image_width(self) -> int:
        """D, numbers of an embedding."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied with to be logits, a float32 scalar."""
        return self.model.logit_scale.float().exp()

    def image_features(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) float32 of images (B, 3, H, W) in [0, 1]; with gradients.

        Images are rounded to 8 bits before the resize, as for a saved file; gradients go straight through.
        """
        return shared(self, images, (), lambda: self._image_features(images))

    def _image_features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.preprocessing(images.to(self.device))
            features = self.encode_images(pixels.to(next(self.model.parameters()).dtype)).float()
        return features / features.norm(dim=-1, keepdim=True)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (B, D) float32; each distinct prompt is encoded once and kept."""
        return torch.stack([self._text.of(prompt, self._text_feature) for prompt in prompts])

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,) float32 of each image and its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of preprocessed pixels."""
        raise NotImplementedError

    def encode_text(self, prompt: str) -> Tensor:
        """Embedding (D,) of one prompt."""
        raise NotImplementedError

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt."""
        raise NotImplementedError

    def _text_feature(self, prompt: str) -> Tensor:
        self.tell_length(self.label, prompt, self.count_tokens(prompt))
        # inference_mode(False): what is kept may meet autograd later
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = self.encode_text(prompt).float()
            return features / features.norm()
