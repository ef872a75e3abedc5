"""Settings of the methods that learn from final samples by the denoising loss. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from diffalign.finetune.config import METHODS
from diffalign.finetune.online_config import Advantage, OnlineConfig

Levels = Annotated[
    Literal["uniform", "schedule"],
    Field(
        description="that samples are noised to: any of pre-training, uniformly; or those that the sampler evaluates"
    ),
]
TimestepsPerSample = Annotated[
    PositiveInt,
    Field(description="levels, each with a noise of its own, at which a sample is trained on in one update"),
]
KLWeight = Annotated[
    float,
    Field(
        ge=0,
        description="weight of the mean square of the difference of the predictions of policy and reference at the "
        "trained levels",
    ),
]


class ForwardConfig(OnlineConfig):
    """What these methods share: the sampler, the levels that are trained at, and the distance to the reference."""

    guidance_scale: float = Field(
        1.0,
        ge=0,
        description="in sampling; training predictions have no guidance and take samples for their own, as they are at "
        "1: see the page on training on final samples before you raise it",
    )
    eta: float = Field(0.0, ge=0, description="DDIM's eta, for a flow the noise level a of the flow SDE; 0: the ODE")
    levels: Levels = "uniform"
    timesteps_per_sample: TimestepsPerSample = 1
    kl_weight: KLWeight = 0.0


class RAFTConfig(ForwardConfig):
    """RAFT, the denoising loss on the best samples of each prompt: see `diffalign.finetune.raft`.

    Needs any reward, and a group_size of 2 or more.
    """

    name: Literal["raft"] = "raft"
    top_k: PositiveInt = Field(1, description="samples of a prompt that are trained on, the best by the reward")


class RWRConfig(ForwardConfig):
    """Reward-weighted regression, Flow-RWR on a flow: see `diffalign.finetune.rwr`.

    Needs any reward.
    """

    name: Literal["rwr"] = "rwr"
    temperature: float = Field(gt=0, description="rewards that differ by this have weights that differ by a factor e")
    normalise: Literal["group", "none"] = Field(
        "group", description="weights are a softmax over the samples of a prompt, or exp(reward / temperature) itself"
    )


class NFTConfig(ForwardConfig):
    """DiffusionNFT, which learns from samples of an older policy, the good and the bad: see `diffalign.finetune.nft`.

    Needs any reward, and a group_size of 2 or more.
    """

    name: Literal["nft"] = "nft"
    num_inference_steps: PositiveInt = 10
    levels: Levels = "schedule"
    timesteps_per_sample: TimestepsPerSample = 10
    kl_weight: KLWeight = 1e-4
    beta: float = Field(1.0, gt=0, description="how far from the old prediction the implicit policies are taken")
    advantage: Advantage = "global_std"
    max_advantage: float = Field(5.0, gt=0, description="the advantage at which a sample is optimal with probability 1")
    old_decay: float = Field(0.5, ge=0, lt=1, description="most that the old policy keeps of itself in a training step")
    old_decay_rate: float = Field(0.001, ge=0, description="what it keeps more with each optimiser update, from 0 on")
    old_decay_start: int = Field(0, ge=0, description="optimiser updates before which it keeps nothing")


METHODS |= {"raft": RAFTConfig, "rwr": RWRConfig, "nft": NFTConfig}
