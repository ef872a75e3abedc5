"""What the training of a noise-aware reward can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from diffalign.finetune.config import METHODS
from diffalign.settings import Settings


class NoisyRewardConfig(Settings):
    """A reward of noisy latents, for guidance: see `diffalign.finetune.noisy_reward`.

    It learns from choices that the recipe's training rewards make between `group_size` samples of each prompt. Their
    names are its objectives, and their weights the mix that it is kept with.
    """

    name: Literal["noisy_reward"] = "noisy_reward"
    num_inference_steps: PositiveInt = Field(50, description="of the samples that it learns from")
    guidance_scale: float = Field(5.0, ge=0, description="likewise")
    eta: float = Field(0.0, ge=0, description="likewise; DDIM's eta, for a flow pipeline the flow SDE's a")
    blocks: PositiveInt = Field(4, description="of the denoiser, from the first; they stay as they are")
    hidden: PositiveInt = Field(128, description="width of an objective's head")
    levels: Literal["schedule", "clean"] = Field(
        "schedule", description="noise levels that it learns at: the pipeline's own, or none, to compare with"
    )
    ties: float = Field(0.2, ge=0, lt=1, description="share of the pairs, those that differ least, that are ties")


METHODS["noisy_reward"] = NoisyRewardConfig
