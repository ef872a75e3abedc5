"""Settings of the methods that train on recorded trajectories. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from diffalign.finetune.config import METHODS
from diffalign.finetune.online_config import Advantage, OnlineConfig
from diffalign.settings import StepNoise


class TrajectoryConfig(OnlineConfig):
    """What these methods share: the noise of their steps, and the unit of log-densities."""

    eta: StepNoise = None
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="of log-densities over the elements of a latent: sum is in nats, mean is that divided by their "
        "number; clip ranges, beta and KL weights are in this unit",
    )
    min_std: float = Field(
        0.0,
        ge=0,
        description="random steps that draw less noise are not trained on: the gradient of a density grows as 1 / std, "
        "and where hardly anything was drawn it says nothing of the reward",
    )


class PolicyGradientConfig(TrajectoryConfig):
    """What the clipped policy gradients share."""

    advantage: Advantage = "group"
    max_advantage: float = Field(5.0, gt=0, description="advantages are clipped to [-this, this]")
    clip_range: float = Field(1e-4, gt=0, description="of a step's ratio, whose logarithm is in `reduction`'s unit")
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the other random steps that are trained on, anew for each training step"
    )
    kl_weight: float = Field(
        0.0, ge=0, description="weight of KL(policy || reference), closed form, mean over the steps, in that unit"
    )
    chi2_weight: float = Field(
        0.0, ge=0, description="weight of chi^2(policy || reference), likewise: see the method's file"
    )


class DDPOConfig(PolicyGradientConfig):
    """Denoising diffusion policy optimisation: see `diffalign.finetune.ddpo`.

    Needs any reward, and steps that draw noise.
    """

    name: Literal["ddpo"] = "ddpo"
    estimator: Literal["importance", "score"] = Field(
        "importance", description="DDPO-IS, clipped ratios; or DDPO-SF, for one update on each sample"
    )
    advantage: Literal["group", "group_mean", "rloo", "rank", "global_std", "batch", "history"] = Field(
        "history", description="see `diffalign.finetune.advantages`"
    )
    history_size: PositiveInt = Field(32, description="rewards of a prompt that advantage: history remembers")
    history_least: PositiveInt = Field(16, description="rewards from which on a prompt has its own statistic")

    @model_validator(mode="after")
    def _reachable(self) -> DDPOConfig:
        if self.history_least > self.history_size:
            raise ValueError(
                f"history_least = {self.history_least} is more than history_size = {self.history_size}, what a prompt "
                "remembers: lower it"
            )
        return self

    @model_validator(mode="after")
    def _on_policy(self) -> DDPOConfig:
        updates = self.num_inner_epochs * self.num_minibatches
        if self.estimator == "score" and updates > 1:
            raise ValueError(
                f"estimator = score holds for samples of the policy itself, and {updates} updates a step train on "
                "older ones: set num_inner_epochs and num_minibatches to 1, or use importance"
            )
        return self


class B2DiffuRLConfig(DDPOConfig):
    """B²-DiffuRL, DDPO with branches and a growing window: see `diffalign.finetune.b2_diffurl`.

    Needs any reward, a group_size of 2 or more, and steps that draw noise.
    """

    name: Literal["b2_diffurl"] = "b2_diffurl"
    num_inference_steps: PositiveInt = 20
    clip_range: float = Field(0.1, gt=0, description="as in ddpo; the authors' 0.1 hardly ever clips")
    window_start: float = Field(
        0.7, gt=0, le=1, description="share of the steps, the last ones, that are trained at first; it grows to all"
    )
    select_threshold: float = Field(
        0.5,
        ge=0,
        description="the best of a prompt's samples trains if its advantage is at least this, the worst if it "
        "is at most minus this, and no other",
    )


class FlowGRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation of flows, Flow-GRPO and its fast form: see `diffalign.finetune.flow_grpo`.

    Needs any reward, a group_size of 2 or more, and for `window` steps enough.
    """

    name: Literal["flow_grpo"] = "flow_grpo"
    num_inference_steps: PositiveInt = 10
    noise: Literal["flow_grpo", "dance_grpo", "cps"] = Field(
        "flow_grpo", description="the SDE's coefficient; or CPS, which keeps no marginals and whose images are cleaner"
    )
    window: PositiveInt | None = Field(
        None, description="Flow-GRPO-Fast: how many steps in a row draw noise and are trained, the others are the ODE's"
    )
    window_share: float = Field(
        0.5, gt=0, le=1, description="the window starts anew each training step within this first share of the steps"
    )
    ratio_norm: bool = Field(False, description="GRPO-Guard: log-ratios without drift, at one scale for all steps")

    @model_validator(mode="after")
    def _fits(self) -> FlowGRPOConfig:
        if self.window is not None and self.window > self.num_inference_steps:
            raise ValueError(
                f"window = {self.window} is longer than num_inference_steps = {self.num_inference_steps}: shorten it"
            )
        return self


class PRDPConfig(TrajectoryConfig):
    """Proximal reward difference prediction: see `diffalign.finetune.prdp`.

    Needs any reward, a group_size of 2 or more, and steps that draw noise.
    """

    name: Literal["prdp"] = "prdp"
    beta: float = Field(gt=0, description="reward for each unit of log-ratio of a whole trajectory, see `reduction`")
    clip_range: float = Field(gt=0, description="of a step's log-ratio to the reference, about the old policy's")


METHODS |= {"b2_diffurl": B2DiffuRLConfig, "ddpo": DDPOConfig, "flow_grpo": FlowGRPOConfig, "prdp": PRDPConfig}
