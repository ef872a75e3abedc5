"""The types of recipe of rewards of sets and of exemplars: what a set should be like, or how varied it should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffalign import media
from diffalign.data import read_prompts
from diffalign.registry import resolve_data
from diffalign.rewards.base import Reward
from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.recipe import REWARD_TYPES
from diffalign.rewards.recipe_types import EncoderRecipe
from diffalign.rewards.sets import CMMDReward, ExemplarReward, FrechetReward, KIDReward, SetCredit, VendiReward

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class SetRecipe(EncoderRecipe):
    """A reward of a set, on the embeddings of CLIP, SigLIP or DINO."""

    def network(self, folder: Path) -> Any:
        """The encoder."""
        from diffalign.rewards.subject import load_vision

        return load_vision(**self.where(folder))  # type: ignore[arg-type]


class ExemplarsRecipe(SetRecipe):
    """What is compared with exemplars, which are images in a folder or captions in a file.

    Attributes:
        kind: of reward that `build` makes.
    """

    kind: ClassVar[type[FrechetReward | CMMDReward]]

    exemplars: str | None = Field(None, description="a folder (relative to this file) of images")
    captions: str | None = Field(
        None,
        description="prompts:NAME, or a .txt, .jsonl or .parquet (relative to this file): exemplars of text, by CLIP",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> ExemplarsRecipe:
        if (self.exemplars is None) == (self.captions is None):
            raise ValueError("name either exemplars, a folder of images, or captions, a file of texts")
        return self

    def build(self, folder: Path) -> Reward:
        """A `SetCredit` of its kind."""
        network = self.network(folder)
        return SetCredit(self.kind(self.reference(network, folder), network.image_features, self.name), network)

    def reference(self, network: Any, folder: Path) -> Tensor:
        """Features (M, D) of the exemplars.

        Raises:
            FileNotFoundError, ValueError: there are none, one cannot be read, or the encoder reads no text.
        """
        if self.exemplars is not None:
            files = image_files(resolve_data(self.exemplars, relative_to=folder))
            with torch.no_grad():
                return torch.cat([network.image_features(images) for images in _batches(files)])
        if not isinstance(network, DualEncoder):
            raise ValueError(f"captions: {self.path} reads no text: name a CLIP or a SigLIP, or give exemplars instead")
        prompts = read_prompts(resolve_data(str(self.captions), relative_to=folder))
        return network.text_features([prompt.text for prompt in prompts])


def _batches(files: list[Path], at_once: int = 64) -> Iterator[Tensor]:
    """Images (B, 3, H, W) in [0, 1], together where they are of one size."""
    for start in range(0, len(files), at_once):
        opened = [media.from_pil(media.open_image(file)) for file in files[start : start + at_once]]
        yield from [torch.cat(opened)] if len({image.shape for image in opened}) == 1 else opened


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name; FileNotFoundError for no folder, ValueError where it holds no image."""
    if not folder.is_dir():
        raise FileNotFoundError(f"exemplars: {folder} is no folder: give one with images.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"exemplars: {folder} holds no image: expected files that end with {', '.join(SUFFIXES)}.")
    return files


@REWARD_TYPES.register("frechet")
class FrechetRecipe(ExemplarsRecipe):
    """Minus the Frechet distance of a set to the exemplars."""

    kind = FrechetReward


@REWARD_TYPES.register("kid")
class KIDRecipe(ExemplarsRecipe):
    """Minus the kernel distance of a set to the exemplars, on unit embeddings times sqrt(D)."""

    def build(self, folder: Path) -> Reward:
        """A `SetCredit` of a `KIDReward` with k = (cosine + 1)^3; of unit embeddings it would be all but linear."""
        network = self.network(folder)
        reference = _scaled(self.reference(network, folder))
        return SetCredit(KIDReward(reference, lambda x: _scaled(network.image_features(x)), self.name), network)


def _scaled(features: Tensor) -> Tensor:
    return features * features.shape[1] ** 0.5


@REWARD_TYPES.register("cmmd")
class CMMDRecipe(ExemplarsRecipe):
    """Minus 1000 times the Gaussian MMD^2 of a set to the exemplars."""

    kind = CMMDReward


@REWARD_TYPES.register("vendi")
class VendiRecipe(SetRecipe):
    """The Vendi score of a set: how many different images it holds."""

    def build(self, folder: Path) -> Reward:
        """A `SetCredit` of a `VendiReward`."""
        network = self.network(folder)
        return SetCredit(VendiReward(network.image_features, self.name), network)


@REWARD_TYPES.register("exemplar_distance")
class ExemplarDistanceRecipe(ExemplarsRecipe):
    """Minus the Frechet distance of each image alone to the exemplars."""

    def build(self, folder: Path) -> Reward:
        """An `ExemplarReward`."""
        network = self.network(folder)
        return ExemplarReward(self.reference(network, folder), network.image_features, self.name, network)
