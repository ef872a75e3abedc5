"""Qwen2-VL that reads a figure and a text, and tells what it holds at the marked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.prompts import check_tokenizer
from diffalign.rewards.qwen_rewards.checkpoint import load_backbone
from diffalign.rewards.vlm.qwen_patches import Folded
from diffalign.rewards.vlm.qwen_processor import QwenProcessor


class QwenReader:
    """Hidden states of a Qwen2-VL at the tokens that a reward model was trained to be read at.

    Every token has its place in the sequence for its position, image and video tokens too. That is no slip: both
    models were trained with transformers 4.45 through a forward pass of their own, which leaves out the positions by
    time, row and column of Wang et al. (2024), arXiv:2409.12191, section 2.1.

    Rows are padded at the end, which no token before it can see, so that a score does not depend on the other rows, up
    to the rounding of batched kernels.

    Args:
        weights: of the backbone, see `load_backbone`.
        base: folder or hub id of the Qwen2-VL that it was tuned from: its sizes, tokenizer, image processor and chat
            template. Its weights are not read.
        marks: tokens that the authors added to the tokenizer, in the order of the text.
        kind: what the text is about.
        place: where the weights are from, for messages.
        revision: of the base's hub repository.
        dtype: of the weights.
        batch_size: figures in one forward pass; it does not change the result.
        lora: see `load_backbone`.

    Raises:
        ValueError: the weights are of another network, or the tokenizer does not belong to them.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        base: str | Path,
        marks: Sequence[str],
        kind: Literal["image", "video"],
        place: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        lora: dict[str, Any] | None = None,
    ) -> None:
        ensure_torchvision()
        from transformers import Qwen2VLConfig

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: at least one figure is read at once.")
        self.kind, self.batch_size = kind, batch_size
        config = Qwen2VLConfig.from_pretrained(str(base), revision=revision)
        self.model = load_backbone(weights, config, place, dtype, lora)
        self.processor = QwenProcessor(str(base), revision)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens(list(marks), special_tokens=True)
        self.marks: list[int] = self.tokenizer.convert_tokens_to_ids(list(marks))
        words = config.text_config.vocab_size
        check_tokenizer(self.tokenizer, words, str(base))
        if len(self.tokenizer) != words:
            raise ValueError(
                f"{place} knows {words} tokens, and the tokenizer of {base} with {', '.join(marks)} has "
                f"{len(self.tokenizer)}: it was tuned from another model."
            )
        # A figure was resized by bicubic filtering, whatever the processor of the base would do.
        self.patches = replace(self.processor.patches, filter="bicubic")

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.model.to(device)
        return self

    def __call__(self, figures: Sequence[Folded], texts: Sequence[str]) -> Tensor:
        """Hidden states (B, marks, D) float32 after the last norm, with gradients to the patches.

        Raises:
            ValueError: a text does not hold each mark once, or holds the mark of an image or video.
        """
        states = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            states.append(self._read(figures[part], texts[part]))
        return torch.cat(states)

    def _read(self, figures: Sequence[Folded], texts: Sequence[str]) -> Tensor:
        inputs = self.processor.inputs(
            [self._chat(text) for text in texts], [[figure] for figure in figures], self.kind
        )
        ids = inputs["input_ids"]
        marked = torch.isin(ids, torch.tensor(self.marks))
        for row, text in zip(ids.masked_fill(~marked, -1), texts, strict=True):
            if row[row >= 0].tolist() != self.marks:
                raise ValueError(f"the text {text[-80:]!r} spells a token that the score is read at: leave it out.")
        device = self.model.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        with torch.autocast(device.type, enabled=False):
            read = self.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return read[marked.to(device)].unflatten(0, (len(texts), len(self.marks))).float()

    def _chat(self, text: str) -> str:
        content = [{"type": self.kind}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
