"""ImageReward: BLIP reads the prompt while it looks at the image, and an affine head scores what it read.

Xu et al. (2023), "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
arXiv:2304.05977, section 2.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.aesthetic import folded
from diffalign.rewards.base import Reward
from diffalign.rewards.blip import load_blip
from diffalign.rewards.preprocessing import ClipPreprocessing
from diffalign.rewards.prompts import PromptCache, PromptReader, check_tokenizer
from diffalign.rewards.weights import find_weights, read_weights, within

_TOKENS = 35  # to which the model was trained and is evaluated; prompts are padded and cut to it
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, beside the published weights


class ImageReward(PromptReader, Reward):
    """(head(h) - 0.16717) / 1.03334 of BLIP's first hidden state h; about -2.3 to 2, higher is preferred.

    BERT reads the prompt ("[CLS] prompt [SEP]", 35 tokens with the padding) and attends to the 197 tokens of a ViT-L/16
    at 224 pixels. The head, five linear layers without activations (dropout does nothing in evaluation), is one,
    multiplied out in float64 and applied in float32. Images are resized as 8-bit pixels, shortest edge first, and
    cropped to the centre; gradients go straight through the roundings.

    Departure: the published code adds BLIP's tokens [DEC] and [ENC] to the tokenizer and never uses them. Here they are
    not added, so that a prompt that spells one out is read as plain text.

    Args:
        checkpoint: file, or OWNER/NAME/FILE on the hub: ``THUDM/ImageReward/ImageReward.pt``. All sizes are read from
            its tensors.
        tokenizer: folder or hub id with BERT's vocabulary.
        name: default: the checkpoint's file name.
        revision: of the hub repository of the checkpoint.
        dtype: of BLIP's weights.

    Raises:
        ValueError: the checkpoint is of another network, or the tokenizer does not belong to it.
    """

    differentiable = True
    token_limit = _TOKENS

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        name: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        ensure_torchvision()
        from transformers import BertTokenizer

        file = find_weights(str(checkpoint), revision)
        weights = read_weights(file)
        self.name = name or file.stem
        self.vision, self.text = (network.to(dtype) for network in load_blip(within(weights, "blip."), str(file)))
        self.weight, self.bias = folded(within(weights, "mlp."), str(file))
        width, read = self.text.config.hidden_size, len(self.weight)
        if read != width:
            raise ValueError(f"{file}: its head reads {read} numbers, and its text encoder makes {width}")
        edge = self.vision.config.image_size
        self.preprocessing = ClipPreprocessing(edge, (edge, edge), "bicubic", round_crop=True)
        self.tokenizer = BertTokenizer.from_pretrained(str(tokenizer))
        check_tokenizer(self.tokenizer, self.text.config.vocab_size, str(tokenizer))
        self._tokens: PromptCache[tuple[list[int], list[int]]] = PromptCache()

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.vision.to(device)
        self.text.to(device)
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight.device

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,) float32."""
        read = [self._tokens.of(prompt, self._tokenise) for prompt in prompts]
        tokens = torch.tensor(read, device=self.device)  # (B, 2, 35)
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.preprocessing(images.to(self.device))
            seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
            read = self.text(input_ids=tokens[:, 0], attention_mask=tokens[:, 1], encoder_hidden_states=seen)
            return (read.last_hidden_state[:, 0].float() @ self.weight + self.bias - _MEAN) / _STD

    def _tokenise(self, prompt: str) -> tuple[list[int], list[int]]:
        """(ids, attention mask), 35 each."""
        self.tell_length(self.name, prompt, len(self.tokenizer(prompt, verbose=False)["input_ids"]))
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=_TOKENS)
        return tokens["input_ids"], tokens["attention_mask"]
