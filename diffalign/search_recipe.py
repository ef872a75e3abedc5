"""The recipe of a search at inference time: what to search, by what, for how long.

Read, checked and told as training recipes are, without torch. A recipe that has a `budget` is one to search with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from diffalign.config import PipelineConfig, RewardsConfig, checked, is_search, read_recipe
from diffalign.finetune.config import METHODS as TRAINING_METHODS
from diffalign.recipe_problems import Problem, RecipeError
from diffalign.search.config import METHODS, ChainConfig
from diffalign.settings import ByName, Settings

__all__ = ["BudgetConfig", "SearchAdapterConfig", "SearchRecipe", "load_search_recipe"]


class BudgetConfig(Settings):
    """What each prompt may cost; a search ends at the first limit that it reaches."""

    nfe: PositiveInt | None = Field(None, description="denoiser evaluations, two a step under guidance")
    reward_calls: PositiveInt | None = Field(None, description="scored images")
    seconds: PositiveFloat | None = Field(None, description="of wall-clock time; prompts side by side share theirs")

    @model_validator(mode="after")
    def _limited(self) -> BudgetConfig:
        if not any((self.nfe, self.reward_calls, self.seconds)):
            raise ValueError("has no limit: give nfe, reward_calls or seconds")
        return self


class SearchAdapterConfig(Settings):
    """A LoRA to search with."""

    path: str = Field(description="a folder with pytorch_lora_weights.safetensors, such as RUN/lora, or its file")


def _not_blank(prompts: str | list[str]) -> str | list[str]:
    if isinstance(prompts, list) and not (prompts and all(text.strip() for text in prompts)):
        raise ValueError("should be texts that are not blank, at least one")
    return prompts


class SearchRecipe(ChainConfig):
    """A whole search. The settings of the chain are at the top level.

    Paths are absolute, `zoo:` and `prompts:` names stay as they are. `rewards.train` is what steers and selects, as in
    training; `rewards.heldout` only judges the image that was found, and the plain one.
    """

    pipeline: PipelineConfig
    adapter: SearchAdapterConfig | None = None
    method: Annotated[Settings, ByName(METHODS)]
    budget: BudgetConfig
    rewards: RewardsConfig
    prompts: Annotated[str | list[str], AfterValidator(_not_blank)] = Field(
        description="a file (.txt, one a line, or .jsonl), prompts:NAME, or a list of texts"
    )
    num_prompts: PositiveInt | None = Field(None, description="the first so many; null: all")
    prompts_per_batch: PositiveInt = Field(
        4, description="prompts searched side by side, and kept together; changes no result beyond rounding"
    )
    report_pool: bool = Field(
        False,
        description="spend each prompt's budget once more on independent samples, to draw best-of-N beside the search",
    )
    output_dir: str = Field(description="folder of the results, relative to the working directory")

    @field_validator("budget")
    @classmethod
    def _affordable(cls, budget: BudgetConfig, info: ValidationInfo) -> BudgetConfig:
        steps = info.data.get("num_inference_steps", 1)
        if budget.nfe is not None and budget.nfe < steps:
            raise ValueError(
                f"nfe = {budget.nfe} does not pay for one image of num_inference_steps = {steps}; raise it"
            )
        return budget


def load_search_recipe(path: str | Path, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Reads, completes and checks a recipe to search with; arguments as for `diffalign.config.load_recipe`.

    Raises:
        RecipeError: with every problem: keys, types, ranges, names that nothing answers to, missing files.
    """
    tree = read_recipe(path, overrides)
    method = tree.get("method")
    if not is_search(tree) and isinstance(method, dict) and method.get("name") in TRAINING_METHODS:
        told = f"is missing, and {method['name']} trains: run `diffalign train {path}`"
        raise RecipeError(str(path), [Problem("budget", told)])
    return checked(SearchRecipe, path, tree)
