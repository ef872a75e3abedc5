"""The types of recipe of vision-language models. Each imports its scorer when it is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, located
from diffalign.rewards.recipe_types import EncoderRecipe

if TYPE_CHECKING:
    from diffalign.rewards.vlm.judge import Judge


class ServerSettings(BaseModel):
    """Where an OpenAI-compatible server is, and how it is asked; see `JudgeServer`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern="^https?://", description="such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="as the server calls it")
    api_key_env: str | None = Field(None, description="environment variable that holds the key, never the key itself")
    read: Literal["logprobs", "text"] = "logprobs"
    extra_body: dict[str, Any] = Field(default_factory=dict, description="fields added to each request")
    cache: str | None = Field(None, description="folder of answers, relative to the working directory")
    concurrency: PositiveInt = 8
    timeout: float = Field(120.0, gt=0, description="seconds for one request")
    retries: int = Field(5, ge=0)


class VLMRecipe(RewardRecipe):
    """A question to a vision-language model, here or behind a server."""

    path: str | None = Field(None, description="a folder (relative to this file) or hub id of a transformers VLM")
    revision: str | None = Field(None, description="of the hub repository")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: PositiveInt = Field(8, description="questions in one forward pass; it does not change the result")
    server: ServerSettings | None = Field(None, description="in the place of path")
    question: str | None = Field(None, description="with {prompt} where the prompt stands; default: that of the type")
    principle: str | None = Field(None, description="a standard to judge by, put before the question")

    @model_validator(mode="after")
    def _one_place(self) -> VLMRecipe:
        if (self.path is None) == (self.server is None):
            raise ValueError("a vision-language model is at a path or behind a server: give one of the two")
        return self

    def judge(self, folder: Path) -> Judge:
        """A `LocalVLM` or a `JudgeServer`."""
        if self.server is not None:
            from diffalign.rewards.vlm.server import JudgeServer

            return JudgeServer(**self.server.model_dump(), name=self.name)
        import torch

        from diffalign.rewards.vlm.local import LocalVLM

        return LocalVLM(
            located(self.path or "", folder),
            name=self.name,
            revision=self.revision,
            dtype=getattr(torch, self.dtype),
            batch_size=self.batch_size,
        )

    def asked(self) -> dict[str, Any]:
        """Arguments of the reward beside its judge."""
        question = {} if self.question is None else {"question": self.question}
        return question | {"principle": self.principle, "name": self.name}


@REWARD_TYPES.register("yes_logit")
class YesLogitRecipe(VLMRecipe):
    """P(yes), the same against no, or their log-odds."""

    score: Literal["probability", "renormalised", "logit"] = "probability"

    def build(self, folder: Path) -> Reward:
        """A `YesLogit`."""
        from diffalign.rewards.vlm.yes_logit import YesLogit

        return YesLogit(self.judge(folder), score=self.score, **self.asked())


@REWARD_TYPES.register("vlm_rating")
class RatingRecipe(VLMRecipe):
    """Expectation over the ratings 1 to 5."""

    def build(self, folder: Path) -> Reward:
        """A `Rating`."""
        from diffalign.rewards.vlm.rating import Rating

        return Rating(self.judge(folder), **self.asked())


@REWARD_TYPES.register("pairwise_judge")
class PairwiseRecipe(VLMRecipe):
    """Win rate among the images of a prompt."""

    def build(self, folder: Path) -> Reward:
        """A `PairwiseJudge`."""
        from diffalign.rewards.vlm.pairwise import PairwiseJudge

        return PairwiseJudge(self.judge(folder), **self.asked())


class WrittenRecipe(VLMRecipe):
    """A judge that writes a text of a known form."""

    axis: str = Field("mean", description="mean, or alignment, coherence or style of the forms that have them")
    max_tokens: PositiveInt = Field(1024, description="of an answer; one that is longer has failed")


@REWARD_TYPES.register("unified_reward")
class UnifiedRewardRecipe(WrittenRecipe):
    """UnifiedReward's rating of an image."""

    form: Literal["axes", "final-score"] = Field("axes", description="axes: version 2.0; final-score: 1.0")

    def build(self, folder: Path) -> Reward:
        """A `WrittenRating`."""
        from diffalign.rewards.vlm.unified_reward import RATINGS
        from diffalign.rewards.vlm.written import WrittenRating

        how = {"axis": self.axis, "max_tokens": self.max_tokens}
        return WrittenRating(self.judge(folder), RATINGS[self.form], **how, **self.asked())


@REWARD_TYPES.register("unified_reward_pairs")
class UnifiedRewardPairsRecipe(WrittenRecipe):
    """Win rate among the images of a prompt, as UnifiedReward compares them."""

    form: Literal["axes", "verdict"] = Field("axes", description="axes: version 2.0; verdict: 1.0")

    def build(self, folder: Path) -> Reward:
        """A `PairwiseJudge` of a `WrittenPairs`."""
        from diffalign.rewards.vlm.pairwise import PairwiseJudge
        from diffalign.rewards.vlm.unified_reward import PAIRS
        from diffalign.rewards.vlm.written import WrittenPairs

        form = PAIRS[self.form]
        judge = WrittenPairs(self.judge(folder), form, axis=self.axis, max_tokens=self.max_tokens)
        return PairwiseJudge(judge, **{"question": form.question} | self.asked())


@REWARD_TYPES.register("answer_pairs")
class AnswerPairsRecipe(VLMRecipe):
    """Win rate among the text answers to one question about one image, in R1-Reward's form."""

    max_tokens: PositiveInt = Field(4096, description="of the judge's text; one that is longer has failed")

    def build(self, folder: Path) -> Reward:
        """An `AnswerPairs`."""
        from diffalign.rewards.vlm.answer_pairs import AnswerPairs

        return AnswerPairs(self.judge(folder), max_tokens=self.max_tokens, **self.asked())


@REWARD_TYPES.register("goal_baseline")
class GoalBaselineRecipe(EncoderRecipe):
    """VLM-RM with goal-baseline regularisation."""

    baseline: str | list[str] = Field(description="what is always there")
    alpha: float = Field(ge=0, le=1, description="strength of the regularisation")
    goal: str | None = Field(None, description="what is wanted; default: each image's own prompt")

    def build(self, folder: Path) -> Reward:
        """A `GoalBaseline`."""
        from diffalign.rewards.vlm.goal_baseline import GoalBaseline

        facts = {"baseline": self.baseline, "alpha": self.alpha, "goal": self.goal, "name": self.name}
        return GoalBaseline(**facts, **self.where(folder))
