"""MPS, the multi-dimensional preference score: a condition says which words of the prompt the image attends to.

Zhang et al. (2024), "Learning Multi-dimensional Human Preference for Text-to-Image Generation", CVPR,
arXiv:2405.14705. The cross-attention layers are those of CoCa (Yu et al. 2022, arXiv:2205.01917) and PaLM (Chowdhery et
al. 2022, arXiv:2204.02311): one key and value for all heads, and a feed-forward beside the attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention, silu

from diffalign.rewards.base import Reward
from diffalign.rewards.encoders.huggingface import tuned_clip
from diffalign.rewards.prompts import PromptCache
from diffalign.rewards.weights import filled, find_weights, read_weights, within

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The published condition of the overall preference, for which weights were released."""

_THRESHOLD = 0.01  # of the published model's forward pass; its evaluation scripts have 0.3
_HEAD_WIDTH = 64
_CACHED_PROMPTS = 256  # 0.3 MB each


class MPSReward(Reward):
    """exp(logit_scale) x cosine of the prompt and of what the image's class token read in it.

    Every token of the prompt has its largest product with a token of the condition. Those above a hundredth of the
    prompt's largest stay; the tokens of the image attend to them through four layers.

    Departures: the products are divided by the largest of each prompt, as for a batch of one; the published code takes
    that of the batch. Pixels are not rounded to half precision.

    Args:
        checkpoint: file of tensors, or OWNER/NAME/FILE on the hub, under the names of the published modules
            (``model.*``, ``cross_model.*``, with or without ``mps.`` before them: ``RE-N-Y/mpsv1/model.safetensors``).
            The authors' own file is a pickled module, which would run code: it is refused.
        base: the CLIP that it was tuned from, laion/CLIP-ViT-H-14-laion2B-s32B-b79K: its sizes, tokenizer and image
            processor.
        condition: what to look for.
        name: default: the checkpoint's file name.
        dtype: of the weights.

    Raises:
        ValueError: the checkpoint is of another network.
    """

    differentiable = True

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path,
        *,
        condition: str = CONDITION,
        name: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        file = find_weights(str(checkpoint))
        weights = {key.removeprefix("mps."): tensor for key, tensor in read_weights(file).items()}
        own = within(weights, "model.")
        own = {key: tensor for key, tensor in own.items() if not key.endswith("position_ids")}
        self.name = name or file.stem
        self.encoder = tuned_clip(own, str(base), str(file), dtype, self.name)
        cross = _cross_weights(weights)
        layers = 1 + max((int(key.split(".")[1]) for key in cross), default=-1)
        width = self.encoder.image_width
        self.cross = filled(CrossModel, cross, str(file), width=width, layers=layers).to(dtype)
        self.token_limit = self.encoder.token_limit
        self.condition = condition
        self._sought: Tensor | None = None  # the condition's tokens, once a prompt was read
        self._read: PromptCache[tuple[Tensor, Tensor, Tensor]] = PromptCache(_CACHED_PROMPTS)

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.encoder.to(device)
        self.cross.to(device)
        self._sought = None
        self._read.clear()
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scores (B,) float32."""
        clip, device = self.encoder.model, self.encoder.device
        with torch.autocast(device.type, enabled=False):
            texts = [self._read.of(prompt, self._text) for prompt in prompts]
            tokens, kept, end = (torch.stack(part) for part in zip(*texts, strict=True))
            pixels = self.encoder.preprocessing(images.to(device)).to(clip.dtype)
            patches = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)
            seen = self.cross(patches, tokens, kept)[:, 0].float()
            return clip.logit_scale.float().exp() * (normalize(seen, dim=-1) * end).sum(dim=-1)

    def _text(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """(projected tokens (T, D), which of them count (T,), unit embedding of the end token (D,)) of one prompt."""
        self.encoder.tell_length(self.name, prompt, self.encoder.count_tokens(prompt))
        with torch.inference_mode(False), torch.no_grad():
            if self._sought is None:
                self._sought, _ = self._projected(self.condition)
            tokens, end = self._projected(prompt)
            product = (tokens.float() @ self._sought.float().T).amax(dim=1)
            kept = product / product.max() > _THRESHOLD
            return tokens, kept, normalize(end.float(), dim=-1)

    def _projected(self, text: str) -> tuple[Tensor, Tensor]:
        clip = self.encoder.model
        # as published without an attention mask: the padding is read too, after the end token
        read = clip.text_model(input_ids=self.encoder.tokenise(text)["input_ids"])
        return clip.text_projection(read.last_hidden_state)[0], clip.text_projection(read.pooler_output)[0]


def _cross_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``cross_model.layers.N.{0, 1}.fn.*`` as `CrossModel` names them; buffers that it makes itself are left out."""
    names = {"0.fn.ff.0": "cross.ff_in", "0.fn.ff.2": "cross.ff_out", "1.fn.ff_out.1": "own.ff_out"}
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith("cross_model.") or name.endswith(("norm.bias", "inv_freq")):
            continue
        _, _, number, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        part = names.get(part, part.replace("0.fn.", "cross.").replace("1.fn.", "own."))
        renamed[f"layers.{number}.{part}.{kind}"] = tensor
    return renamed


class CrossModel(nn.Module):
    """Image tokens attend to the text, then to one another, ``layers`` times."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"cross": _CrossAttention(width), "own": _SelfAttention(width)}) for _ in range(layers)
        )

    def forward(self, x: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        """Image tokens (B, N, D), text tokens (B, T, D), which of these count (B, T), to image tokens (B, N, D)."""
        for layer in self.layers:
            x = x + layer["cross"](x, text, kept)
            x = x + layer["own"](x)
        return x


class _Scale(nn.Module):
    """Layer norm without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weight)


class _CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Scale(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ff_in = nn.Linear(width, 8 * width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(text).chunk(2, dim=-1)
        read = _attend(_heads(self.to_q(x)), key, value, kept[:, None, None])
        return self.to_out(read) + self.ff_out(_swiglu(self.ff_in(x)))


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Scale(width)
        self.parts = (width, _HEAD_WIDTH, _HEAD_WIDTH, 8 * width)  # queries, key, value, feed-forward
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        read = _attend(_rotated(_heads(query)), _rotated(key), value, None)
        return self.attn_out(read) + self.ff_out(_swiglu(hidden))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, _HEAD_WIDTH)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None) -> Tensor:
    """Queries (B, heads, N, 64) on one key and value (B, T, 64) for all heads, to (B, N, D)."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=kept).transpose(1, 2).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    """Shazeer (2020), arXiv:2002.05202; the gate is the second half."""
    value, gate = x.chunk(2, dim=-1)
    return silu(gate) * value


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions, Su et al. (2021), arXiv:2104.09864: numbers i and i + 32 turn by position x 10000^(-i / 32)."""
    half = x.shape[-1] // 2
    speed = 10_000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
