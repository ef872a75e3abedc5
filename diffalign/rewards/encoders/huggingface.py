"""CLIP and SigLIP as transformers has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.rewards.encoders.base import DualEncoder
from diffalign.rewards.preprocessing import ClipPreprocessing
from diffalign.rewards.prompts import check_tokenizer
from diffalign.rewards.weights import filled, pretrained


class TransformersEncoder(DualEncoder):
    """A `CLIPModel`, or a `SiglipModel` (SigLIP, and SigLIP 2 of fixed size), of transformers.

    Radford et al. (2021), arXiv:2103.00020; Zhai et al. (2023), arXiv:2303.15343; Tschannen et al. (2025),
    arXiv:2502.14786. SigLIP 2 was trained on lower case, which the tokenizer of its checkpoints leaves to the caller.

    Args:
        model: the network.
        source: folder or id of the tokenizer and the image processor.
        revision: of the hub repository.
        label: what warnings call it.

    Raises:
        ValueError: the tokenizer does not belong to the model.
    """

    def __init__(self, model: Any, source: str, revision: str | None, label: str) -> None:
        super().__init__()
        from transformers import AutoTokenizer
        from transformers.image_processing_base import ImageProcessingMixin

        self.label = label
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        self.preprocessing = ClipPreprocessing.from_config(config)
        self.token_limit = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        self.is_siglip = self.model.config.model_type == "siglip"
        check_tokenizer(self.tokenizer, self.model.config.text_config.vocab_size, source)

    @property
    def image_width(self) -> int:
        """D."""
        config = self.model.config
        return config.vision_config.hidden_size if self.is_siglip else config.projection_dim

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D)."""
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def count_tokens(self, prompt: str) -> int:
        """Tokens with those of begin and end."""
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def encode_text(self, prompt: str) -> Tensor:
        """Embedding (D,)."""
        return _tensor(self.model.get_text_features(**self.tokenise(prompt)))[0]

    def tokenise(self, prompt: str) -> dict[str, Tensor]:
        """What the text tower reads, padded to the token limit. SigLIP was trained to attend to the padding too."""
        if self.is_siglip and "Gemma" in type(self.tokenizer).__name__:
            prompt = prompt.lower()
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self.token_limit, return_tensors="pt"
        )
        names = ["input_ids"] if self.is_siglip else ["input_ids", "attention_mask"]
        return {name: tokens[name].to(self.device) for name in names}


def load_model(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    """The network of a folder or hub id; safetensors only.

    Raises:
        ValueError: it is another model, or lacks weights.
    """
    ensure_torchvision()
    from transformers import AutoConfig, CLIPModel, SiglipModel

    known = {"clip": CLIPModel, "siglip": SiglipModel}
    kind = AutoConfig.from_pretrained(path, revision=revision).model_type
    if kind not in known:
        raise ValueError(
            f"{path} is a model of type {kind!r}, and an encoder is one of {', '.join(known)}: for others name an "
            "open_clip model"
        )
    return pretrained(known[kind], path, revision, dtype)


def tuned_clip(
    weights: dict[str, Tensor], base: str, place: str, dtype: torch.dtype, label: str
) -> TransformersEncoder:
    """A `CLIPModel` of the base's sizes with these weights, and the base's tokenizer; the base's own are not loaded.

    Raises:
        ValueError: the weights, which are from `place`, are of another architecture.
    """
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    model = filled(CLIPModel, weights, place, config=CLIPConfig.from_pretrained(base))
    return TransformersEncoder(model.to(dtype), base, None, label)


def _tensor(output: Any) -> Tensor:
    """Projected features: transformers 5 wraps them in a model output, 4 returned them."""
    return output if isinstance(output, Tensor) else output.pooler_output
