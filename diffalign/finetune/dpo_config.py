"""What direct preference optimisation can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.finetune.config import CACHE, METHODS
from diffalign.settings import Settings

PAIRS = "a .parquet in Pick-a-Pic's columns, a .jsonl of prompt, chosen, rejected, or a .json of HPDv2"
SFT_WEIGHT = Field(
    0.0,
    ge=0,
    description="weight of the denoising error of the chosen image, beside beta / 2 of the pair; above 0 it keeps what "
    "was chosen likely",
)


class DiffusionDPOConfig(Settings):
    """Diffusion-DPO, learning from pairs of images of which one was preferred: see `diffalign.finetune.dpo`."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    pairs: str = Field(description=PAIRS)
    cache: str | None = Field(None, description=CACHE)
    beta: float = Field(
        5000.0, gt=0, description="how dear it is to leave the reference; errors are means over a latent's elements"
    )
    sft_weight: float = SFT_WEIGHT


class FlowDPOConfig(Settings):
    """Flow-DPO, learning from pairs of images of which one was preferred: see `diffalign.finetune.dpo`."""

    name: Literal["flow_dpo"] = "flow_dpo"
    pairs: str = Field(description=PAIRS)
    cache: str | None = Field(None, description=CACHE)
    beta: float = Field(
        500.0, gt=0, description="how dear it is to leave the reference; errors are means over a latent's elements"
    )
    sft_weight: float = SFT_WEIGHT
    beta_schedule: Literal["constant", "timestep"] = Field(
        "constant", description="timestep: beta (1 - t)^2, which the derivation gives and the paper found worse"
    )


METHODS["diffusion_dpo"] = DiffusionDPOConfig
METHODS["flow_dpo"] = FlowDPOConfig
