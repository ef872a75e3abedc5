"""HPSv3: Qwen2-VL rates an image for its prompt, and says how sure it is.

Ma et al. (2025), "HPSv3: Towards Wide-Spectrum Human Preference Score", arXiv:2508.03789.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffalign.media import resize
from diffalign.rewards.base import Reward
from diffalign.rewards.qwen_rewards.checkpoint import split_weights
from diffalign.rewards.qwen_rewards.hpsv3_template import TEMPLATE
from diffalign.rewards.qwen_rewards.reader import QwenReader
from diffalign.rewards.weights import filled, find_weights, read_weights

_MARK = "<|Reward|>"
_PIXELS = 256 * 28 * 28  # every image has about as many, small ones too


class HPSv3Reward(Reward):
    """mu of N(mu, sigma^2), the preference for an image given its prompt; higher is preferred.

    The hidden state h at the token <|Reward|>, which ends the authors' rating instructions, goes through a head of
    three linear layers with ReLU between (3584, 1024, 16, 2): (mu, s) = head(h), and sigma = exp(s), so that s is the
    logarithm of a standard deviation. So the authors' training loss has it, which draws the difference of two images
    from N(mu_1 - mu_2, sigma_1^2 + sigma_2^2); their scorer returns s as it is. Sigma comes beside
    each score, without gradients.

    Images are resized as 8-bit pixels to about 256 x 28 x 28, in multiples of 28 along each edge; gradients go straight
    through the roundings. The prompt is read whole. A prompt that spells <|Reward|> or an image token fails.

    Departures: the authors run the backbone in bfloat16; here it runs in ``dtype``, and the head in float32 as theirs.
    Angles of the image encoder's rotary embedding are not rounded to bfloat16; its frequencies are.

    Args:
        checkpoint: file, or OWNER/NAME/FILE on the hub: ``MizzenAI/HPSv3/HPSv3.safetensors``.
        base: folder or hub id of Qwen2-VL-7B-Instruct: sizes, tokenizer, image processor and chat template; its
            weights are not read.
        name: default: the checkpoint's file name.
        revision: of the base's hub repository.
        dtype: of the backbone's weights.
        batch_size: images in one forward pass; it does not change the result.

    Raises:
        ValueError: the checkpoint is of another network, or the tokenizer does not belong to it.
    """

    differentiable = True
    states_sigma = True

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        name: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ) -> None:
        file = find_weights(str(checkpoint))
        backbone, head = split_weights(read_weights(file))
        self.name = name or file.stem
        self.reader = QwenReader(
            backbone, base, [_MARK], "image", str(file), revision=revision, dtype=dtype, batch_size=batch_size
        )
        self.patches = replace(self.reader.patches, min_pixels=_PIXELS, max_pixels=_PIXELS)
        self.head = _load_head(head, self.reader.model.config.text_config.hidden_size, str(file))

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.reader.to(device)
        self.head.to(device)
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(mu, sigma) (B, 2) float32."""
        size = self.patches.size(*images.shape[-2:])
        frames = resize(images.to(self.reader.model.device), size, self.patches.filter)
        folded = [self.patches.fold(image.expand(self.patches.frames, -1, -1, -1)) for image in frames]
        states = self.reader(folded, [TEMPLATE.format(prompt=prompt) for prompt in prompts])
        with torch.autocast(states.device.type, enabled=False):
            mean, log_sigma = self.head(states[:, 0]).unbind(dim=1)
        return torch.stack([mean, log_sigma.exp()], dim=1)


class RatingHead(nn.Sequential):
    """Numbered as published, where 2 is a dropout."""

    def __init__(self, width: int, first: int, second: int) -> None:
        layers = nn.Linear(width, first), nn.ReLU(), nn.Identity(), nn.Linear(first, second), nn.ReLU()
        super().__init__(*layers, nn.Linear(second, 2))


def _load_head(weights: dict[str, Tensor], width: int, place: str) -> RatingHead:
    sizes = [len(weights[name]) if name in weights else 0 for name in ("0.weight", "3.weight")]
    weights = {name: tensor.float() for name, tensor in weights.items()}
    return filled(RatingHead, weights, place, width=width, first=sizes[0], second=sizes[1])
