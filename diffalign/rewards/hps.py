"""HPSv2 and HPSv2.1: CLIP ViT-H/14 tuned on human preferences. Wu et al. (2023), arXiv:2306.09341."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.media import quantise
from diffalign.rewards.clip import CLIPReward
from diffalign.rewards.encoders.huggingface import tuned_clip
from diffalign.rewards.weights import find_weights, read_weights


class HPSReward(CLIPReward):
    """Cosine of the embeddings, 0.15 to 0.35; leaderboards show it times 100. It compares images of one prompt.

    The published checkpoint has open_clip's names; here its tensors go into the `CLIPModel` of the same architecture.
    Images are letterboxed: the longest edge becomes 224 and black bars fill the square. The published code resizes a
    float tensor with torchvision's default, which filters since 0.17 and did not before (other scores); here it
    filters, and does not round, as there.

    Args:
        checkpoint: file, or OWNER/NAME/FILE on the hub: ``xswu/HPSv2/HPS_v2.1_compressed.pt``.
        base: the CLIP that it was tuned from, laion/CLIP-ViT-H-14-laion2B-s32B-b79K: its sizes and its tokenizer.
        name: default: the checkpoint's file name.
        dtype: of the weights.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path,
        *,
        name: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        file = find_weights(str(checkpoint))
        encoder = tuned_clip(from_open_clip(read_weights(file)), str(base), str(file), dtype, file.stem)
        edge = encoder.model.config.vision_config.image_size
        encoder.preprocessing = replace(
            encoder.preprocessing, resize_to=edge, crop=None, filter="bicubic", letterbox=True, rounding=False
        )
        super().__init__(encoder, name=name)

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Cosines (B,) of the pixels that would be saved."""
        return super().values(quantise(images), prompts, metadata)


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's tensors under open_clip's names as `CLIPModel` names them; what belongs to no CLIP is left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tower, name = (
            ("vision_model", name.removeprefix("visual.")) if name.startswith("visual.") else ("text_model", name)
        )
        if name in _PROJECTIONS.get(tower, {}):
            renamed[_PROJECTIONS[tower][name]] = tensor.T
        elif name in _NAMES[tower]:
            renamed[f"{tower}.{_NAMES[tower][name]}"] = tensor
        elif name == "logit_scale":
            renamed[name] = tensor
        elif name.startswith("transformer.resblocks."):
            renamed |= _block(tower, name, tensor)
    return renamed


def _block(tower: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    _, _, number, rest = name.split(".", 3)
    layer = f"{tower}.encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", tensor.chunk(3), strict=True)}
    module, kind = rest.rsplit(".", 1)
    return {f"{layer}.{_BLOCK[module]}.{kind}": tensor} if module in _BLOCK else {}


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTIONS = {
    "vision_model": {"proj": "visual_projection.weight"},
    "text_model": {"text_projection": "text_projection.weight"},
}
_NAMES = {
    "vision_model": {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    },
    "text_model": {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    },
}
