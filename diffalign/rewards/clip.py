"""CLIP score and PickScore over any transformers `CLIPModel`, batched and differentiable.

CLIP score: Hessel et al. (2021), arXiv:2104.08718, here the plain cosine, without the factor 2.5, the clip at zero
and the prefix "A photo depicts". PickScore: Kirstain et al. (2023), arXiv:2305.01569.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.media import resize
from diffalign.rewards.base import Reward

logger = logging.getLogger(__name__)

_CACHED_PROMPTS = 16_384
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipPreprocessing:
    """What a CLIP image processor does to 8-bit pixels, on tensors and with gradients.

    Attributes:
        resize_to: the shortest edge, (height, width), or None for no resize.
        crop: (height, width) of the centre crop, or None.
        filter: name for `media.resize`.
        mean, std: of each colour channel.
    """

    resize_to: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    filter: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Reads the dictionary of a `preprocessor_config.json`; what it leaves out is as in `CLIPImageProcessor`."""
        resample = config.get("resample", 3)
        if resample not in _FILTERS:
            raise ValueError(f"resample = {resample!r} of the image processor is not one of {_FILTERS}.")
        if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError("the image processor does not rescale by 1/255: its pixels are not those of a CLIP model.")
        normalised = config.get("do_normalize", True)
        preprocessing = cls(
            resize_to=_size(config.get("size", 224)) if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            filter=_FILTERS[resample],
            mean=tuple(config.get("image_mean", _OPENAI_MEAN)) if normalised else (0.0,) * 3,
            std=tuple(config.get("image_std", _OPENAI_STD)) if normalised else (1.0,) * 3,
        )
        edge, crop = preprocessing.resize_to, preprocessing.crop
        if edge is not None and crop is not None and max(crop) > (edge if isinstance(edge, int) else min(edge)):
            raise ValueError(f"the image processor crops {crop} out of images resized to {edge}: it would have to pad.")
        return preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised (B, 3, h, w)."""
        images = images.float()
        if self.resize_to is not None:
            images = resize(images, self._target(*images.shape[-2:]), self.filter)
        if self.crop is not None:
            height, width = self.crop
            top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
            images = images[..., top : top + height, left : left + width]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize_to, int):
            return self.resize_to
        short, long = min(height, width), max(height, width)
        other = int(self.resize_to * long / short)  # truncated, as transformers does
        return (self.resize_to, other) if height <= width else (other, self.resize_to)


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _size(size: int | dict[str, int]) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if set(size) == {"height", "width"}:
        return _pair(size)
    raise ValueError(f"size = {size} of the image processor is not a shortest edge or a height and a width.")


class CLIPReward(Reward):
    """Cosine of CLIP's image and text embeddings, in [-1, 1]; 0.15 to 0.35 for OpenAI's models and real captions.

    Prompts are tokenised and encoded once and kept. What is past the token limit is cut off, keeping the end token, and
    counted in ``truncated_prompts``. Images are rounded to 8 bits before the resize, as for a saved file; gradients go
    straight through.

    Args:
        path: a local folder or hub id that `CLIPModel.from_pretrained` reads. Safetensors only.
        name: default: the last part of the path.
        processor: folder or id of the tokenizer and image processor, where they are not beside the weights.
        revision: of the hub repository.
        dtype: of the weights. Embeddings are normalised and compared in float32.
    """

    differentiable = True

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        processor: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        ensure_torchvision()
        from transformers import AutoTokenizer
        from transformers.image_processing_base import ImageProcessingMixin

        self.name = name or Path(path).name
        self.model = _load_model(str(path), revision, dtype)
        source, revision = (str(path), revision) if processor is None else (str(processor), None)
        self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        self.preprocessing = ClipPreprocessing.from_config(config)
        self.token_limit = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        self.truncated_prompts = 0
        self._text: dict[str, Tensor] = {}
        self._check_tokenizer(source)

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.model.to(device)
        self._text.clear()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Cosines (B,)."""
        return self.cosine(images, prompts)

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,) float32 of each image and its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) float32 of images (B, 3, H, W) in [0, 1]; with gradients."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.preprocessing(images.to(self.device)).to(self.model.dtype)
            features = _tensor(self.model.get_image_features(pixel_values=pixels)).float()
        return features / features.norm(dim=-1, keepdim=True)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (B, D) float32; each distinct prompt is encoded once and kept."""
        return torch.stack([self._text_feature(prompt) for prompt in prompts])

    def _text_feature(self, prompt: str) -> Tensor:
        """Encoded on its own: its last bits must not depend on the batch that it first came in, nor on a resume."""
        if prompt not in self._text:
            if len(self._text) >= _CACHED_PROMPTS:
                self._text.pop(next(iter(self._text)))  # the oldest
            # inference_mode(False): what is kept may meet autograd later
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                tokens = self._tokenise(prompt)
                features = _tensor(self.model.get_text_features(**tokens)).float()[0]
                self._text[prompt] = features / features.norm()
        return self._text[prompt]

    def _tokenise(self, prompt: str) -> dict[str, Tensor]:
        length = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        if length > self.token_limit:
            self.truncated_prompts += 1
            if self.truncated_prompts == 1:
                logger.warning(
                    "reward %r reads at most %d tokens: prompt %r has %d and is cut off. This is said once; "
                    "`truncated_prompts` counts.",
                    self.name,
                    self.token_limit,
                    prompt[:80],
                    length,
                )
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self.token_limit, return_tensors="pt"
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _check_tokenizer(self, source: str) -> None:
        """Some releases of transformers load a tokenizer without its vocabulary, and every word gets the same id."""
        first, second = (self.tokenizer(text)["input_ids"] for text in ("a red circle", "two blue squares"))
        if set(first) == set(second):
            raise ValueError(f"the tokenizer of {source} knows no word but {first}: its vocabulary did not load.")
        words = self.model.config.text_config.vocab_size
        if max(first + second) >= words:
            raise ValueError(
                f"the tokenizer of {source} gives the id {max(first + second)}, and the model knows {words} words: "
                "they do not belong together."
            )


class PickScoreReward(CLIPReward):
    """exp(logit_scale) x cosine of a CLIP tuned on preferences, the published form; 16 to 26 for PickScore v1.

    The softmax of the scores of several images of one prompt is the probability that each is preferred.
    """

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Scaled cosines (B,)."""
        return self.model.logit_scale.float().exp() * self.cosine(images, prompts)


def _load_model(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import CLIPModel

    model, info = CLIPModel.from_pretrained(
        path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    absent = sorted(info["missing_keys"])
    if absent:
        raise ValueError(
            f"{path} lacks {len(absent)} weights of a CLIPModel, such as {absent[0]}: it is another model."
        )
    return model.requires_grad_(False).eval()


def _tensor(output: Any) -> Tensor:
    """Projected features: transformers 5 wraps them in a model output, 4 returned them."""
    return output if isinstance(output, Tensor) else output.pooler_output
