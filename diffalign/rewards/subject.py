"""Does an image show the subject of some reference images? Cosine of the embeddings of DINO, DINOv2 or CLIP."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.media import from_pil, open_image
from diffalign.rewards.base import Reward
from diffalign.rewards.encoders import DualEncoder, load_encoder
from diffalign.rewards.networks import ImageNetwork
from diffalign.rewards.prompts import PromptCache

_CACHED_REFERENCES = 4096


class VisionEncoder(ImageNetwork):
    """Unit embeddings of images: the class token of DINO (Caron et al. 2021, arXiv:2104.14294), DINOv2 or their kin.

    Args:
        path: a folder or hub id of an `AutoModel` whose first token is that of the image.
        **how: as for `ImageNetwork`.
    """

    def __init__(self, path: str | Path, *, revision: str | None = None, **how: Any) -> None:
        super().__init__("AutoModel", path, revision=revision, **_without_pooler(path, revision), **how)
        if not any(name.endswith("cls_token") for name, _ in self.model.named_parameters()):
            raise ValueError(f"{path} is a {type(self.model).__name__}, which has no class token: name a DINO model.")

    def image_features(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) float32 of images (B, 3, H, W) in [0, 1]; with gradients."""
        features = self(images).last_hidden_state[:, 0]
        return features / features.norm(dim=-1, keepdim=True)


def _without_pooler(path: str | Path, revision: str | None) -> dict[str, bool]:
    """Of ViTs, published DINO lacks the layer that pools the class token, which is not read here."""
    ensure_torchvision()
    from transformers import MODEL_MAPPING, AutoConfig

    kind = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(str(path), revision=revision)), object)
    pools = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if pools else {}


def load_vision(path: str | Path, *, library: str = "transformers", **how: Any) -> DualEncoder | VisionEncoder:
    """What `load_encoder` loads, where the path holds an encoder of images and text; else a `VisionEncoder`."""
    if library == "transformers":
        ensure_torchvision()
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(str(path), revision=how.get("revision")).model_type
        if kind not in ("clip", "siglip"):
            return VisionEncoder(path, **how)
    return load_encoder(path, library=library, **how)


class SubjectSimilarity(Reward):
    """Mean cosine of the image's embedding and those of the reference images, in [-1, 1]; differentiable.

    With DINO ViT-S/16 it is DINO, with CLIP it is CLIP-I of DreamBooth (Ruiz et al. 2023, arXiv:2208.12242). The
    image similarity of RPO (Miao et al. 2024, arXiv:2407.12164) is the same with ALIGN, mapped to (1 + c) / 2 and
    combined with the prompt's by `Harmonic`.

    ``metadata["reference"]`` names the references of a sample: a path, a tensor (3, H, W) or (R, 3, H, W) in [0, 1],
    or a list of these. Their embeddings are kept, those of a file until it changes.

    Args:
        path: a folder or hub id of DINO, DINOv2, CLIP or SigLIP, or an encoder.
        name: default: the last part of the path.
        **how: as for `load_encoder`; a network of images alone takes ``processor`` and ``revision``.
    """

    differentiable = True
    needs = ("reference",)
    files = ("reference",)

    def __init__(self, path: str | Path | DualEncoder | VisionEncoder, *, name: str | None = None, **how: Any) -> None:
        self.encoder = path if isinstance(path, DualEncoder | VisionEncoder) else load_vision(path, **how)
        self.name = name or Path(self.encoder.label).name
        self._kept: PromptCache[Tensor] = PromptCache(_CACHED_REFERENCES)

    def to(self, device: torch.device | str) -> Self:
        """Moves the encoder, for all rewards on it."""
        self.encoder.to(device)
        return self

    def values(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Mean cosines (B,) float32."""
        # the mean of the cosines with unit vectors is the product with their mean
        wanted = torch.stack([self._wanted(entry.get("reference")) for entry in metadata])
        features = self.encoder.image_features(images)
        return (features * wanted).sum(dim=-1)

    def _wanted(self, reference: Any) -> Tensor:
        """Mean of the unit embeddings of the references of one sample (D,)."""
        known = [self._kept.of(_address(each), lambda _, it=each: self._feature(it)) for each in _references(reference)]
        return torch.stack([feature.to(self.encoder.device) for feature in known]).mean(dim=0)

    def _feature(self, reference: str | Path | Tensor) -> Tensor:
        image = reference if isinstance(reference, Tensor) else from_pil(open_image(reference))[0]
        # one at a time: its last bits must not depend on its neighbours
        with torch.inference_mode(False), torch.no_grad():
            return self.encoder.image_features(image.detach().clone()[None])[0]


def _references(reference: Any) -> list[str | Path | Tensor]:
    """Paths and images (3, H, W). ValueError: something else, or none."""
    if isinstance(reference, Tensor) and reference.ndim == 4:
        reference = list(reference)
    found = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not found:
        raise ValueError("reference is an empty list: name at least one image of the subject")
    for each in found:
        picture = isinstance(each, Tensor) and each.ndim == 3 and len(each) == 3 and each.is_floating_point()
        if not picture and not isinstance(each, str | Path):
            kind = f"a tensor {tuple(each.shape)} {each.dtype}" if isinstance(each, Tensor) else repr(each)[:80]
            raise ValueError(f"reference is {kind}, and must be a path, an image (3, H, W) in [0, 1], or several")
    return found


def _address(reference: str | Path | Tensor) -> str:
    """What tells a reference from another: the pixels of a tensor; name, time and size of a file."""
    if isinstance(reference, Tensor):
        pixels = reference.detach().float().cpu().contiguous()
        return f"{tuple(pixels.shape)} {hashlib.sha256(pixels.numpy()).hexdigest()}"
    path = Path(reference)
    stamp = path.stat() if path.is_file() else None  # of one that is none, open_image says why
    return f"{path.absolute()} {stamp and (stamp.st_mtime_ns, stamp.st_size)}"
