"""The types of reward recipe. Each imports its scorer when it is built: listing rewards loads no model library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, located, part


class EncoderRecipe(RewardRecipe):
    """A scorer on an encoder of images and text."""

    path: str = Field(min_length=1, description="zoo:NAME, a folder (relative to this file), a hub id, or open_clip's")
    library: Literal["transformers", "open_clip"] = "transformers"
    processor: str | None = Field(
        None, description="where tokenizer and image processor are, if not beside the weights"
    )
    revision: str | None = Field(None, description="of the hub repository")

    def where(self, folder: Path) -> dict[str, object]:
        """Arguments of `load_encoder`."""
        if self.library == "open_clip":
            return {"path": self.path, "library": self.library}
        processor = self.processor and located(self.processor, folder)
        return {"path": located(self.path, folder), "processor": processor, "revision": self.revision}


@REWARD_TYPES.register("clip")
class ClipRecipe(EncoderRecipe):
    """Cosine of image and prompt."""

    def build(self, folder: Path) -> Reward:
        """A `CLIPReward`."""
        from diffalign.rewards.clip import CLIPReward

        return CLIPReward(name=self.name, **self.where(folder))


@REWARD_TYPES.register("pickscore")
class PickScoreRecipe(EncoderRecipe):
    """exp(logit_scale) x cosine."""

    def build(self, folder: Path) -> Reward:
        """A `PickScoreReward`."""
        from diffalign.rewards.clip import PickScoreReward

        return PickScoreReward(name=self.name, **self.where(folder))


@REWARD_TYPES.register("aesthetic")
class AestheticRecipe(EncoderRecipe):
    """A small head on the image's embedding."""

    head: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")

    def build(self, folder: Path) -> Reward:
        """An `AestheticReward`."""
        from diffalign.rewards.aesthetic import AestheticReward

        return AestheticReward(head=located(self.head, folder), name=self.name, **self.where(folder))


@REWARD_TYPES.register("preference")
class PreferenceRecipe(EncoderRecipe):
    """A head that was trained on preference pairs, on the encoder's embeddings."""

    head: str = Field(description="a safetensors file (relative to this one), or OWNER/NAME/FILE on the hub")

    def build(self, folder: Path) -> Reward:
        """A `PreferenceReward`."""
        from diffalign.rewards.preference import PreferenceReward

        return PreferenceReward(head=located(self.head, folder), name=self.name, **self.where(folder))


@REWARD_TYPES.register("hps")
class HpsRecipe(RewardRecipe):
    """HPSv2 or HPSv2.1."""

    checkpoint: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")
    base: str = Field(description="the CLIP that it was tuned from: its sizes and its tokenizer")

    def build(self, folder: Path) -> Reward:
        """An `HPSReward`."""
        from diffalign.rewards.hps import HPSReward

        return HPSReward(located(self.checkpoint, folder), located(self.base, folder), name=self.name)


@REWARD_TYPES.register("image_reward")
class ImageRewardRecipe(RewardRecipe):
    """ImageReward."""

    checkpoint: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")
    tokenizer: str = Field("google-bert/bert-base-uncased", description="folder or hub id with BERT's vocabulary")
    revision: str | None = Field(None, description="of the hub repository")

    def build(self, folder: Path) -> Reward:
        """An `ImageReward`."""
        from diffalign.rewards.imagereward import ImageReward

        places = {"tokenizer": located(self.tokenizer, folder), "revision": self.revision}
        return ImageReward(located(self.checkpoint, folder), name=self.name, **places)


@REWARD_TYPES.register("mps")
class MpsRecipe(RewardRecipe):
    """MPS under one condition."""

    checkpoint: str = Field(description="a file (relative to this one), or OWNER/NAME/FILE on the hub")
    base: str = Field(description="the CLIP that it was tuned from: its sizes, tokenizer and image processor")
    condition: str | None = Field(
        None, description="what to look for; null: the published condition, of the overall score"
    )

    def build(self, folder: Path) -> Reward:
        """An `MPSReward`."""
        from diffalign.rewards.mps import CONDITION, MPSReward

        condition = CONDITION if self.condition is None else self.condition
        checkpoint, base = located(self.checkpoint, folder), located(self.base, folder)
        return MPSReward(checkpoint, base, condition=condition, name=self.name)


@REWARD_TYPES.register("jpeg_size")
class JpegSizeRecipe(RewardRecipe):
    """Bytes of the image as a JPEG."""

    def build(self, folder: Path) -> Reward:
        """A `JpegSize`."""
        from diffalign.rewards.jpeg import JpegSize

        return JpegSize(name=self.name)


@REWARD_TYPES.register("ocr")
class OcrRecipe(RewardRecipe):
    """Whether the image shows a text."""

    def build(self, folder: Path) -> Reward:
        """A `TextMatch`."""
        from diffalign.rewards.ocr import TextMatch

        return TextMatch(name=self.name)


@REWARD_TYPES.register("frames")
class FramesRecipe(RewardRecipe):
    """An image reward on frames of a video."""

    reward: str | dict[str, Any] = Field(description="name, file (relative to this one) or recipe of an image reward")
    sampling: Literal["segments", "uniform", "all"] = "segments"
    number: PositiveInt = Field(4, description="of frames; all has no use for it")
    attenuation: float = Field(0.0, ge=0, description="lambda of exp(-lambda |i - F / 2|), by which frames count less")

    def build(self, folder: Path) -> Reward:
        """A `FrameReward`."""
        from diffalign.rewards.frames import FrameReward

        inner, how = part(self.reward, folder), {"number": self.number, "attenuation": self.attenuation}
        return FrameReward(inner, sampling=self.sampling, name=self.name, **how)


@REWARD_TYPES.register("motion_smoothness")
class MotionSmoothnessRecipe(RewardRecipe):
    """How evenly a video moves, from its pixels."""

    def build(self, folder: Path) -> Reward:
        """A `MotionSmoothness`."""
        from diffalign.rewards.motion import MotionSmoothness

        return MotionSmoothness(name=self.name)


@REWARD_TYPES.register("dynamic_degree")
class DynamicDegreeRecipe(RewardRecipe):
    """How much a video moves, from its pixels."""

    def build(self, folder: Path) -> Reward:
        """A `DynamicDegree`."""
        from diffalign.rewards.motion import DynamicDegree

        return DynamicDegree(name=self.name)
