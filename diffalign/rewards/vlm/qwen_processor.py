"""What is read of a Qwen-VL repository beside its weights: tokenizer, image processor, chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.vlm.qwen_patches import Folded, QwenPatches

_MARKS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class QwenProcessor:
    """In the place of transformers' processor, which also makes that of videos and for it needs torchvision.

    Args:
        path: a local folder or hub id.
        revision: of the hub repository.

    Raises:
        ValueError: there is no chat template, or the tokenizer does not know the token of an image.
    """

    def __init__(self, path: str, revision: str | None) -> None:
        ensure_torchvision()
        from transformers import AutoTokenizer, ProcessorMixin
        from transformers.image_processing_base import ImageProcessingMixin

        self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
        self.patches = QwenPatches.from_config(pixels)
        given, _ = ProcessorMixin.get_processor_dict(path, revision=revision)
        self.chat_template = given.get("chat_template") or self.tokenizer.chat_template
        if not self.chat_template:
            raise ValueError(f"{path} has no chat template: it is not a model that answers, or lacks a file.")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(_MARKS["image"])
        if self.image_token_id in (None, self.tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {path} does not know {_MARKS['image']}: it is no Qwen-VL model's.")

    def apply_chat_template(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **settings
        )

    def inputs(
        self, chats: Sequence[str], figures: Sequence[Sequence[Folded]], kind: Literal["image", "video"] = "image"
    ) -> dict[str, Tensor]:
        """What a model reads of chats, each with the figures that it tells of, in their order.

        Raises:
            ValueError: a chat has the token of an image or video in its text, which would shift the figures after it.
        """
        spelt = [self._spelt(chat, own, kind) for chat, own in zip(chats, figures, strict=True)]
        tokens = self.tokenizer(spelt, padding=True, return_tensors="pt")
        patches, grids = zip(*chain.from_iterable(figures), strict=True)
        read = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return read | {_PIXELS[kind]: torch.cat(patches), f"{kind}_grid_thw": torch.tensor(grids)}

    def _spelt(self, chat: str, figures: Sequence[Folded], kind: str) -> str:
        """The chat with a token for each merged patch."""
        for each, mark in _MARKS.items():
            if chat.count(mark) != (len(figures) if each == kind else 0):
                raise ValueError(f"the question has {mark} in its text: leave it out.")
        counts = iter(len(patches) // self.patches.merge**2 for patches, _ in figures)
        return re.sub(re.escape(_MARKS[kind]), lambda mark: mark[0] * next(counts), chat)


def load_processor(path: str, revision: str | None) -> Any:
    """A `QwenProcessor` where the image processor is one of Qwen-VL, else what transformers has for the family.

    Raises:
        ValueError: there is no image processor.
    """
    ensure_torchvision()
    from transformers import AutoProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
    except OSError:  # no such file; transformers' own loader says what is missing
        config = {}
    if str(config.get("image_processor_type")).startswith("Qwen2VLImageProcessor"):
        return QwenProcessor(path, revision)
    processor = AutoProcessor.from_pretrained(path, revision=revision)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{path} has no image processor: it is not a vision-language model, or lacks a file.")
    return processor
