"""Does an image hold the text that its prompt asks for? The OCR reward of Flow-GRPO, arXiv:2505.05470, by RapidOCR."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor

from diffalign.media import to_pil
from diffalign.rewards.base import Reward

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class TextMatch(Reward):
    """1 - (edit distance between the text read and the text asked for) / (length of the latter), in [0, 1].

    The text asked for is ``metadata["text"]``, or else the prompt's first span in double quotes. Both texts are
    compared without white space and in lower case; a text that holds the one asked for scores 1, whatever else it
    holds. Not differentiable.

    Departures from Flow-GRPO's code: PP-OCRv6, from the wheel of rapidocr, reads in place of PaddleOCR, and gets its
    channels in the order that it expects; typographic quotes count; a prompt without a text, and an image that the
    reader fails on, are failed scores and no error and no 0. An image in which nothing is read does score 0.
    """

    optional = ("text",)

    def __init__(self, name: str = "ocr") -> None:
        self.name = name
        self.reader = _reader()

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Similarities (B,)."""
        targets = [target_text(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        read = [self.read(picture) for picture in to_pil(images)]
        matches = [text_match(text, target) for text, target in zip(read, targets, strict=True)]
        return images.new_tensor(matches, dtype=torch.float32)

    def read(self, picture: Any) -> str:
        """All text in a Pillow image, box after box."""
        return "".join(self.reader(picture).txts or ())


def target_text(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that an image of this prompt is to hold. ValueError if neither metadata nor prompt tells."""
    found = _QUOTED.search(prompt)
    text = metadata["text"] if "text" in metadata else (found[1] or found[2] or "") if found else ""
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(
            f"no text to look for: put it in double quotes in the prompt {prompt[:80]!r}, or in its metadata as text"
        )
    return text


def text_match(read: str, target: str) -> float:
    """1 - min(d, n) / n, with d the edit distance and n the length of the target; 1 where ``read`` holds the target."""
    read, target = _plain(read), _plain(target)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of a character that make ``b`` of ``a``, Levenshtein (1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _reader() -> Any:
    libraries = os.environ.get("LD_LIBRARY_PATH")
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError("the OCR reward needs rapidocr: pip install 'diffalign[ocr]'") from error
    finally:  # OpenCV adds its folder, which every process that is started later would inherit
        if libraries is None:
            os.environ.pop("LD_LIBRARY_PATH", None)
        else:
            os.environ["LD_LIBRARY_PATH"] = libraries
    return RapidOCR(
        params={
            "Global.use_cls": False,  # which turns text that stands on its head; Flow-GRPO reads without
            "Global.log_level": "critical",  # it tells of every image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        }
    )
