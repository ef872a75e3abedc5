"""Any model of open_clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.encoders.base import DualEncoder
from diffalign.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, ClipPreprocessing


class OpenCLIPEncoder(DualEncoder):
    """Any model of open_clip, with its own tokenizer and preprocessing (Ilharco et al. 2021).

    Args:
        path: ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or ``ARCHITECTURE/TAG`` as in open_clip.list_pretrained().

    Raises:
        ValueError: open_clip is not installed, or it knows no such model.
    """

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        ensure_torchvision()
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(f"{path} needs open_clip: pip install 'diffalign[clip]'") from error

        name, tag = (path, None) if ":" in path else (path.rpartition("/")[0], path.rpartition("/")[2])
        try:
            self.model, _, _ = open_clip.create_model_and_transforms(name, pretrained=tag)
        except RuntimeError as error:
            raise ValueError(
                f"open_clip has no model {path}: use ARCHITECTURE/TAG of open_clip.list_pretrained()"
            ) from error
        self.model.to(dtype).requires_grad_(False).eval()
        self.label = path
        self.tokenizer = open_clip.get_tokenizer(name)
        self.token_limit = self.tokenizer.context_length
        self.preprocessing = _of_open_clip(open_clip.get_model_preprocess_cfg(self.model))

    @property
    def image_width(self) -> int:
        """D."""
        return self.model.visual.output_dim

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D)."""
        return self.model.encode_image(pixels)

    def encode_text(self, prompt: str) -> Tensor:
        """Embedding (D,)."""
        return self.model.encode_text(self.tokenizer([prompt]).to(self.device))[0]

    def count_tokens(self, prompt: str) -> int:
        """Tokens with those of begin and end; open_clip's own tokenizers tell only how many they kept."""
        encode = getattr(self.tokenizer, "encode", None)
        if encode is not None:
            return len(encode(prompt)) + 2
        return len(self.tokenizer.tokenizer(prompt)["input_ids"])


def _of_open_clip(config: dict[str, Any]) -> ClipPreprocessing:
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    mode = config["resize_mode"]
    if mode not in ("shortest", "squash", "longest") or config["interpolation"] not in ("bicubic", "bilinear"):
        raise ValueError(
            f"open_clip's preprocessing {config} is unknown: resize_mode and interpolation are none of ours."
        )
    return ClipPreprocessing(
        resize_to=(size, size) if mode == "squash" else size,
        crop=(size, size) if mode == "shortest" else None,
        filter=config["interpolation"],
        mean=tuple(config.get("mean") or OPENAI_MEAN),
        std=tuple(config.get("std") or OPENAI_STD),
        round_crop=True,
        letterbox=mode == "longest",
    )
