"""What direct preference optimisation can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.finetune.config import METHODS
from diffalign.settings import Settings


class DiffusionDPOConfig(Settings):
    """Diffusion-DPO, learning from pairs of images of which one was preferred: see `diffalign.finetune.dpo`."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    pairs: str = Field(description="a .parquet in Pick-a-Pic's columns, or a .jsonl of prompt, chosen, rejected")
    beta: float = Field(
        5000.0, gt=0, description="how dear it is to leave the reference; errors are means over a latent's elements"
    )


class FlowDPOConfig(Settings):
    """Flow-DPO, learning from pairs of images of which one was preferred: see `diffalign.finetune.dpo`."""

    name: Literal["flow_dpo"] = "flow_dpo"
    pairs: str = Field(description="a .parquet in Pick-a-Pic's columns, or a .jsonl of prompt, chosen, rejected")
    beta: float = Field(
        500.0, gt=0, description="how dear it is to leave the reference; errors are means over a latent's elements"
    )
    beta_schedule: Literal["constant", "timestep"] = Field(
        "constant", description="timestep: beta (1 - t)^2, which the derivation gives and the paper found worse"
    )


METHODS["diffusion_dpo"] = DiffusionDPOConfig
METHODS["flow_dpo"] = FlowDPOConfig
