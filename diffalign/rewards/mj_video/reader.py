"""InternVL2 that reads frames and a text, and tells what it holds where an answer would begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffalign._compat import ensure_torchvision
from diffalign.rewards.mj_video.checkpoint import load_backbone
from diffalign.rewards.mj_video.template import ANSWER, IMAGE, START, USER
from diffalign.rewards.mj_video.tokenizer import read_tokenizer
from diffalign.rewards.preprocessing import ClipPreprocessing

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class InternVLReader:
    """Hidden states of an InternVL2 at the end of the question and at the last token before the answer.

    Rows are padded at the end, which no token before it can see, so that a score does not depend on the other rows, up
    to the rounding of batched kernels.

    Args:
        weights: of the backbone, under the names of InternVL2's own code.
        base: folder or hub id of the InternVL2 that it was tuned from: its sizes and its tokenizer. Its weights are not
            read, and its code is not run.
        place: where the weights are from, for messages.
        revision: of the base's hub repository.
        dtype: of the weights.
        batch_size: videos in one forward pass; it does not change the result.

    Raises:
        ValueError: the weights are of another network, or the tokenizer does not belong to them.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        base: str | Path,
        place: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 2,
    ) -> None:
        ensure_torchvision()
        from transformers import PretrainedConfig

        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: at least one video is read at once.")
        self.batch_size = batch_size
        self.tokenizer = read_tokenizer(str(base), revision)
        self.marks = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        for mark in ("<s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE):
            if mark not in self.marks:
                raise ValueError(f"the tokenizer of {base} does not know {mark}: it is not that of an InternVL2.")
        tree, _ = PretrainedConfig.get_config_dict(str(base), revision=revision)
        tree = tree | {"llm_config": tree.get("llm_config", {}) | {"vocab_size": self.tokenizer.get_vocab_size()}}
        image_token = self.tokenizer.encode(IMAGE).ids[0]
        self.model = load_backbone(weights, tree, image_token, place, dtype)
        vision = self.model.config.vision_config
        size, side = vision.image_size, vision.image_size[0] // vision.patch_size[0]
        self.pixels = ClipPreprocessing(tuple(size), None, "bicubic", _MEAN, _STD)
        self.tokens = int(side * self.model.config.downsample_ratio) ** 2  # of a frame

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.model.to(device)
        return self

    def __call__(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Hidden states (B, 2, D) float32 after the last norm, of frames (F, 3, H, W) in [0, 1], with gradients.

        Raises:
            ValueError: a prompt holds a mark of the model, or is too long.
        """
        states = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            states.append(self._read(videos[part], prompts[part]))
        return torch.cat(states)

    def _read(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        device, dtype = self.model.device, self.model.dtype
        rows = [self._ids(prompt, len(video)) for video, prompt in zip(videos, prompts, strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(device)
        pixels = torch.cat([self.pixels(video.to(device)) for video in videos]).to(dtype)
        with torch.autocast(device.type, enabled=False):
            # without a mask: under the causal one no token sees the padding after it
            read = self.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        answer = len(self.tokenizer.encode(ANSWER, add_special_tokens=False).ids)
        places = torch.stack([last - answer + 1, last], dim=1)
        return read.gather(1, places[..., None].expand(-1, -1, read.shape[-1])).float()

    def _ids(self, prompt: str, frames: int) -> Tensor:
        """The tokens of a conversation that asks about so many frames."""
        for mark in self.marks:
            if mark in prompt:
                raise ValueError(f"the prompt {prompt[-80:]!r} spells {mark}, a mark of the model: leave it out.")
        text = START + USER.format(prompt=prompt).replace(IMAGE, IMAGE * self.tokens * frames) + ANSWER
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        most = self.model.config.text_config.max_position_embeddings
        if len(ids) > most:
            raise ValueError(
                f"prompt and video make {len(ids)} tokens, and the model reads at most {most}: shorten it."
            )
        return torch.tensor(ids)
