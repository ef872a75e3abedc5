"""Settings of the methods that learn from scores of their own samples. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from diffalign.settings import EVERY_STEP, GuidanceInterval, Settings

Advantage = Annotated[
    Literal["group", "group_mean", "rloo", "rank", "global_std", "batch"],
    Field(description="see `diffalign.finetune.advantages`"),
]


class OnlineConfig(Settings):
    """What these methods share: how the policy is sampled, and how often the samples are used."""

    num_inference_steps: PositiveInt = 50
    guidance_scale: float = Field(5.0, ge=0, description="in sampling and in training: it belongs to the policy")
    guidance_interval: GuidanceInterval = EVERY_STEP
    num_inner_epochs: PositiveInt = Field(1, description="passes over the samples of a step")
    num_minibatches: PositiveInt = Field(1, description="optimiser updates in a pass, each on its part of the prompts")
