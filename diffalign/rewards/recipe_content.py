"""The types of recipe of rewards that look at content: subjects, conditions, objects."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, located
from diffalign.rewards.recipe_types import EncoderRecipe


@REWARD_TYPES.register("subject")
class SubjectRecipe(EncoderRecipe):
    """Cosine of the image and its reference images."""

    def build(self, folder: Path) -> Reward:
        """A `SubjectSimilarity`."""
        from diffalign.rewards.subject import SubjectSimilarity

        return SubjectSimilarity(name=self.name, **self.where(folder))


@REWARD_TYPES.register("edge_consistency")
class EdgeConsistencyRecipe(RewardRecipe):
    """Edges against those of a picture."""

    def build(self, folder: Path) -> Reward:
        """An `EdgeConsistency`."""
        from diffalign.rewards.conditions import EdgeConsistency

        return EdgeConsistency(name=self.name)


class NetworkRecipe(RewardRecipe):
    """A scorer on a network of transformers that reads images."""

    path: str = Field(min_length=1, description="a folder (relative to this file) or hub id")
    revision: str | None = Field(None, description="of the hub repository")


@REWARD_TYPES.register("depth_consistency")
class DepthConsistencyRecipe(NetworkRecipe):
    """Depth against a map."""

    def build(self, folder: Path) -> Reward:
        """A `DepthConsistency`."""
        from diffalign.rewards.conditions import DepthConsistency

        return DepthConsistency(located(self.path, folder), name=self.name, revision=self.revision)


@REWARD_TYPES.register("segmentation_consistency")
class SegmentationConsistencyRecipe(NetworkRecipe):
    """Classes of pixels against a map."""

    def build(self, folder: Path) -> Reward:
        """A `SegmentationConsistency`."""
        from diffalign.rewards.conditions import SegmentationConsistency

        return SegmentationConsistency(located(self.path, folder), name=self.name, revision=self.revision)


@REWARD_TYPES.register("geneval")
class GenEvalRecipe(RewardRecipe):
    """Objects, their number, colour and place, by a detector and CLIP."""

    detector: str = Field(min_length=1, description="a folder (relative to this file) or hub id")
    clip: str = Field(min_length=1, description="zoo:NAME, a folder (relative to this file) or a hub id; tells colours")
    strict: bool = Field(False, description="GenEval's verdict, 0 or 1, in place of the share that is met")

    def build(self, folder: Path) -> Reward:
        """A `GenEval`."""
        from diffalign.rewards.geneval import GenEval

        places = located(self.detector, folder), located(self.clip, folder)
        return GenEval(*places, strict=self.strict, name=self.name)
