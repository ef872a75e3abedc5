"""What a training method can be told: settings shared by all methods, and each method's own.

This file imports no torch, so that a recipe is checked, listed and refused at once. Names are those of diffusers'
training scripts wherever they have one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from diffalign.settings import EVERY_STEP, GuidanceInterval, Settings

CACHE = (
    "folder of latents and of all encoded prompts, which runs share, from the working directory; null: they stay in "
    "main memory"
)


class SFTConfig(Settings):
    """The denoising loss on images of one's own, beside the loss of any method: see `diffalign.finetune.supervised`."""

    images: str = Field(
        description="a .jsonl with file (or file_name) and prompt (or caption, or text) a line, as `diffalign sample` "
        "writes it, or an imagefolder's metadata.jsonl"
    )
    weight: float = Field(gt=0, description="of the denoising error, a mean over a latent's elements, in the loss")
    batch_size: PositiveInt = Field(16, description="images of an optimiser update, all processes together")
    cache: str | None = Field(None, description=CACHE)


class TrainingConfig(Settings):
    """Settings of the loop that every training method shares.

    `num_prompts_per_step` is global (all processes together); `micro_batch_size` counts images in one differentiable
    rollout and never changes a result beyond rounding.
    """

    num_prompts_per_step: PositiveInt = 16
    group_size: PositiveInt = Field(1, description="images per prompt and step")
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="images in one rollout with gradient; auto: all of a process's, on a GPU as many as fit"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: of bitsandbytes, on a GPU; a quarter of the state of AdamW"
    )
    learning_rate: float = Field(1e-3, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-4, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_l2: float = Field(
        0.0,
        ge=0,
        description="weight in the loss of the squared distance of all weights from the base, |scale B A|^2 over the "
        "layers; adam_weight_decay shrinks A and B each for itself",
    )
    sft: SFTConfig | None = Field(None, description="supervised images beside what the method learns from")
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of a moving average of what is trained over optimiser updates, which is then validated, compared "
        "and saved in its place; it rises to this as (1 + n) / (10 + n), as in diffusers",
    )
    max_train_steps: PositiveInt = 100
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: Literal["step", "block", "none"] = Field(
        "step",
        description="what the backward pass computes again: whole denoiser calls (memory of one call, however many "
        "steps have a gradient), or the blocks inside them (less for few such steps)",
    )
    seed: int = Field(0, ge=0)


class FullGradient(Settings):
    """Backpropagation through every step."""

    kind: Literal["full"] = "full"


class LastKGradient(Settings):
    """DRaFT-K: gradient through the last `k` steps only.

    The scheduler of SD3 evaluates its last step at a sigma near 0 (0.001 with shift 1, 0.009 with shift 3), where the
    image hardly depends on the prediction: with k = 1 the gradient all but vanishes there. Use 3 or more.
    """

    kind: Literal["last_k"] = "last_k"
    k: PositiveInt = 1


class RandomKGradient(Settings):
    """AlignProp: as `last_k`, with k drawn uniformly from `low..high`, once per trajectory."""

    kind: Literal["random_k"] = "random_k"
    low: PositiveInt = 1
    high: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> RandomKGradient:
        if self.low > self.high:
            raise ValueError(f"gradient.low = {self.low} is above gradient.high = {self.high}; swap them")
        return self


class DRTuneGradient(Settings):
    """DRTune: gradient at `k` equally spaced steps whose network input is detached, with a random early stop."""

    kind: Literal["drtune"] = "drtune"
    k: PositiveInt = 3
    early_stop: float = Field(0.4, ge=0, lt=1, description="the stop falls in this last part of the steps; 0: never")


class SparseGradient(Settings):
    """FlowBP-Sparse: as `drtune` without a stop, at `k` random steps, of which late ones are drawn oftener."""

    kind: Literal["sparse"] = "sparse"
    k: PositiveInt = 3
    late_bias: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="step i of 0, 1, ... has the weight (i + 1) ** late_bias"
    )


class LowVarianceGradient(Settings):
    """DRaFT-LV: x_0 as predicted at the last step, and `n` predictions more from fresh noise at the last level.

    The loss is the mean over the `n + 1`; each is decoded and scored. As with `last_k` and k = 1 the gradient all but
    vanishes where the last sigma is near 0: with the scheduler of SD3 use skip = 1.
    """

    kind: Literal["lv"] = "lv"
    n: PositiveInt = 2
    skip: int = Field(0, ge=0, description="steps left out at the end; 1 leaves out the last step of SD3")


Gradient = Annotated[
    FullGradient | LastKGradient | RandomKGradient | DRTuneGradient | SparseGradient | LowVarianceGradient,
    Field(discriminator="kind"),
]


class RewardBackpropConfig(Settings):
    """Reward backpropagation (AlignProp, DRaFT, DRTune, FlowBP): see `diffalign.finetune.reward_backprop`.

    Where the gradient flows, `gradient`:

        {kind: full}                           through every step
        {kind: last_k, k: 1}                   DRaFT-K: through the last k steps
        {kind: random_k, low: 1, high: 10}     AlignProp: as last_k, k drawn uniformly for each training step
        {kind: drtune, k: 3, early_stop: 0.4}  DRTune: k equally spaced steps with detached inputs, and a random stop
        {kind: sparse, k: 3, late_bias: 2.0}   FlowBP-Sparse: k random, mostly late, steps with detached inputs
        {kind: lv, n: 2, skip: 0}              DRaFT-LV: the last step, and n more from fresh noise at its level
    """

    name: Literal["reward_backprop"] = "reward_backprop"
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = Field(5.0, ge=0)
    guidance_interval: GuidanceInterval = EVERY_STEP
    eta: float = Field(0.0, ge=0, description="DDIM's eta; for a flow pipeline the noise level a of the flow SDE")
    guidance: Literal["pipeline", "detach_unconditional"] = Field(
        "pipeline", description="detach_unconditional: no gradient through the unconditional branch"
    )
    gradient: Gradient = Field(default_factory=LastKGradient, description="where the gradient flows, see above")
    loss: Literal["linear", "target", "hinge"] = Field(
        "linear",
        description="of the reward r: -r, |r - target|, or max(target - r, 0), which stops pushing at the target",
    )
    target: float | None = None
    kl_weight: float = Field(0.0, ge=0, description="weight of the distance to the reference; see the method's file")

    @model_validator(mode="after")
    def _consistent(self) -> RewardBackpropConfig:
        if self.loss != "linear" and self.target is None:
            raise ValueError(f"loss = {self.loss} needs method.target, the reward value at which to stop pushing")
        if self.loss == "linear" and self.target is not None:
            raise ValueError(f"target = {self.target} has no effect with loss = linear; set loss to target or hinge")
        k = getattr(self.gradient, "k", None) or getattr(self.gradient, "high", 1)
        if k > self.num_inference_steps:
            raise ValueError(
                f"gradient asks for {k} steps with gradient but num_inference_steps is {self.num_inference_steps}; "
                "lower it, or use gradient.kind = full"
            )
        skip = getattr(self.gradient, "skip", 0)
        if skip >= self.num_inference_steps:
            raise ValueError(
                f"gradient.skip = {skip} leaves no step of num_inference_steps = {self.num_inference_steps}; "
                "use 0, or 1 with the scheduler of SD3"
            )
        return self


METHODS: dict[str, type[Settings]] = {"reward_backprop": RewardBackpropConfig}
