r"""Reward backpropagation: AlignProp, DRaFT, DRTune and FlowBP-Sparse, which differ in where the gradient flows.

The images of a differentiable rollout go through a differentiable reward, and its gradient returns through the
decoder and the sampler to the adapter:

    minimise  E_{c, x_T} [ L(r(decode(x_0), c)) + kl_weight * D ],     L(r) = -r,  |r - target|  or  max(target - r, 0)

D keeps the policy near the reference (adapter off, at the same x_t): the mean over the graded evaluations of the mean
square of the difference of the two predictions. For equal variances it is the KL of a step up to a factor of that
step (DRaFT+).

Sources: Prabhudesai et al. 2023 (AlignProp, arXiv 2310.03739), Clark et al. 2023 (DRaFT, arXiv 2309.17400), Wu et al.
2024 (DRTune, arXiv 2405.00760), Wang et al. 2026 (FlowBP, arXiv 2606.11075).

Departures from the reference codes:
- `random_k` draws its truncation once per step for the whole batch, as the paper says; trl drew a coin at every
  denoising step.
- Steps without gradient build no graph at all; the reference codes detach a prediction that they computed with one.
- The loss is the plain mean of L, with no hidden constant or scale; kl_weight is in units of the reward.
- `sparse` needs no second evaluation and no straight-through residual: with detached inputs the path of the sampler
  from the drawn steps to x_0 has the value and the gradient of FlowBP's surrogate, memory is that of k evaluations
  likewise, and only the choice of steps sets it apart from `drtune` without a stop. The gradient is not rescaled by
  the share of the path that was drawn, as some of the authors' recipes do.
- `lv` averages L over the n + 1 predictions of x_0, so that n does not change the scale. All are decoded at once: lower
  micro_batch_size by that factor. `skip` leaves out steps at the end, for schedules that all but end before them.
- A failed score contributes no gradient; it is counted, and the mean is still over all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.config import RewardBackpropConfig
from diffalign.finetune.trainer import TRAINERS, Trainer, reward_sums
from diffalign.laws import default_law
from diffalign.ledger import Ledger
from diffalign.noise import Address, generator
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import (
    DRTune,
    Full,
    GradientRule,
    LastK,
    LowVariance,
    Plan,
    RandomK,
    Sparse,
    differentiable_rollout,
    in_interval,
)


@TRAINERS.register("reward_backprop")
class RewardBackprop(Trainer):
    """Trains the adapter by the gradient of a differentiable reward.

    Its settings are the fields of `TrainingConfig` and of `RewardBackpropConfig`.

    Raises ValueError at once if the reward is not differentiable, or does not score each image for itself.
    """

    config_class = RewardBackpropConfig
    config: RewardBackpropConfig

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        if not self.reward.differentiable:
            raise ValueError(
                f"reward {self.reward.name!r} is not differentiable and reward backpropagation needs its gradient; "
                "use a differentiable reward, or a method that needs scores only"
            )
        if self.reward.groupwise:
            raise ValueError(
                f"reward {self.reward.name!r} compares the images of a prompt, which micro-batches take apart here; "
                "use one that scores each image, or a method of groups"
            )
        self.schedule = policy.schedule(self.config.num_inference_steps)
        self.law = default_law(self.schedule.kind, self.config.eta)
        self.rule = gradient_rule(self.config)
        self.guidance_scale = in_interval(self.config.guidance_scale, len(self.schedule), self.config.guidance_interval)

    def accumulate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], Ledger]:
        """One differentiable rollout, decode, score and backward pass a micro-batch; the plan is shared by all."""
        group = self.training.group_size
        images = [(p, i) for p in prompts for i in range(group)]
        condition = self.policy.encode([p.text for p, _ in images])
        plan = self.rule.plan(len(self.schedule), generator(self.training.seed, "truncation", self.step))
        sums: dict[str, Tensor] = {}
        ledger = Ledger()
        for chunk in self.micro_batches(len(images)):
            rows = [(p.id, self.step, i) for p, i in images[chunk]]
            part, cost = self._backward([p for p, _ in images[chunk]], rows, condition.rows(chunk), plan)
            sums = {k: sums.get(k, 0) + v for k, v in part.items()}
            ledger.add(cost)
        return sums, ledger

    def _backward(
        self, prompts: Sequence[Prompt], rows: Sequence[Address], condition: Condition, plan: Plan
    ) -> tuple[dict[str, Tensor], Ledger]:
        """Rollout, decode, score and backward of one micro-batch; sums over its images of what is reported."""
        config = self.config
        trajectory = differentiable_rollout(
            self.policy,
            condition,
            self.law,
            self.schedule,
            rows=rows,
            seed=self.training.seed,
            guidance_scale=self.guidance_scale,
            guidance=config.guidance,
            plan=plan,
            checkpoint=self.training.gradient_checkpointing == "step",
            reference=config.kl_weight > 0,
        )
        pixels = self.policy.decode(trajectory.latents)
        copies = len(pixels) // len(prompts)  # predictions of x_0 for each image: n + 1 under lv, elsewhere 1
        score = self.reward(pixels, [p.text for p in prompts] * copies, [p.metadata for p in prompts] * copies)
        zero = torch.zeros_like(score.value)
        # where, not multiplication: a failed score may hold NaN, and 0 * NaN is NaN, in the gradient too.
        value = torch.where(score.valid, score.value, zero)
        loss = torch.where(score.valid, self.loss(value), zero)
        distance = zero if trajectory.prediction_mse is None else trajectory.prediction_mse
        objective = (loss.sum() / copies + config.kl_weight * distance.sum()) / self.images
        if objective.requires_grad:  # not where every score failed
            objective.backward()

        ledger = trajectory.ledger
        ledger.decodes += len(pixels)
        ledger.reward_calls += len(pixels)
        ledger.reward_failures += int((~score.valid).sum())
        sums = {
            "loss": objective * self.images,
            **{name: v / copies for name, v in reward_sums(score).items()},
            "prediction_mse": distance.sum(),
        }
        return {name: v.detach() for name, v in sums.items()}, ledger

    def loss(self, reward: Tensor) -> Tensor:
        """L(r), elementwise: (B,) -> (B,)."""
        if self.config.loss == "linear":
            return -reward
        if self.config.loss == "target":
            return (reward - self.config.target).abs()
        return torch.relu(self.config.target - reward)


def gradient_rule(config: RewardBackpropConfig) -> GradientRule:
    """The rule that `config.gradient` names."""
    gradient = config.gradient
    if gradient.kind == "full":
        return Full()
    if gradient.kind == "last_k":
        return LastK(gradient.k)
    if gradient.kind == "random_k":
        return RandomK(gradient.low, gradient.high)
    if gradient.kind == "drtune":
        return DRTune(gradient.k, gradient.early_stop)
    if gradient.kind == "sparse":
        return Sparse(gradient.k, gradient.late_bias)
    return LowVariance(gradient.n, gradient.skip)
