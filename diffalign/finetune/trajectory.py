"""The loop of the methods that train on recorded trajectories: sample, score, and update on what was sampled.

A training step draws `group_size` samples of each prompt without gradient, keeps every state and the Gaussian that it
was drawn from (the old policy), scores the images, and makes `num_inner_epochs` x `num_minibatches` optimiser updates.
A method writes `minimise`, the gradient of one part. Nothing outlives the step, so that a checkpoint between two steps
is whole without trajectories; only a method's statistics are kept in it.

On the first update the policy is the old one: with the same rows evaluated together as in sampling, which is how it is
done here, log-ratios are exactly 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign import media
from diffalign.data import Prompt
from diffalign.finetune.trainer import Trainer
from diffalign.finetune.trajectory_config import TrajectoryConfig
from diffalign.laws import Law, Normal, default_law
from diffalign.ledger import Ledger
from diffalign.noise import generator
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import Trajectory, in_interval, rollout
from diffalign.rollout.guidance import scale_at

_NOISE = {"diffusion": 1.0, "flow": 0.7}
"""eta of DDIM, and a of the flow SDE."""


@dataclass(eq=False)
class Part:
    """The samples of one minibatch: whole groups, one after another.

    Attributes:
        prompts: (B,) of each sample.
        condition: theirs.
        trajectory: with all states, and the Gaussians that they were drawn from.
        rewards: (B,) float64 on the host, NaN where the score failed.
        sums: of what is reported of rewards, over the samples.
        advantages: (B,), of policy gradients.
        pairs: of PRDP, over all processes.
        reference: of PRDP, the reference's Gaussian of each trained step.
    """

    prompts: list[Prompt]
    condition: Condition
    trajectory: Trajectory
    rewards: Tensor
    sums: dict[str, Tensor]
    advantages: Tensor | None = None
    pairs: int = 0
    reference: dict[int, Normal] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)


class TrajectoryTrainer(Trainer):
    """What DDPO, Flow-GRPO and PRDP share. Settings: `TrainingConfig`, `TrajectoryConfig` and the method's own.

    Attributes:
        on_policy: whether the weights are those that drew the step's samples, as they are until its first update.

    Raises ValueError at once for prompts that do not divide into the minibatches.
    """

    config: TrajectoryConfig
    on_policy = False

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        count = self.training.num_prompts_per_step // self.accelerator.num_processes
        if count % self.config.num_minibatches:
            raise ValueError(
                f"num_minibatches = {self.config.num_minibatches} does not divide the {count} prompts of a process: "
                "use a divisor"
            )
        self.schedule = policy.schedule(self.config.num_inference_steps)
        self.guidance_scale = in_interval(self.config.guidance_scale, len(self.schedule), self.config.guidance_interval)

    def law(self) -> Law:
        """The law of this training step's samples."""
        noise = _NOISE[self.schedule.kind] if self.config.eta is None else self.config.eta
        return default_law(self.schedule.kind, noise)

    @abstractmethod
    def weigh(self, parts: list[Part], prompts: Sequence[Prompt]) -> None:
        """Look at the rewards of the whole step before its first update; `prompts` are those of all processes."""

    @abstractmethod
    def minimise(self, part: Part, law: Law, steps: list[int]) -> tuple[dict[str, Tensor], Ledger]:
        """Add the gradient of the loss of one part, divided by `self.images` as in `accumulate`; sums and cost."""

    @property
    def images(self) -> int:
        """Samples of one update, of all processes."""
        return self.training.num_prompts_per_step * self.training.group_size // self.config.num_minibatches

    def scale(self, step: int) -> float:
        """The guidance scale of a step."""
        return scale_at(self.guidance_scale, step)

    def updates(self, prompts: Sequence[Prompt]) -> Iterator[tuple[dict[str, Tensor], Ledger]]:
        """Sample and score once, then one update after another."""
        law, own = self.law(), self.share(prompts)
        size = len(own) // self.config.num_minibatches
        parts, ledger = [], Ledger()
        for start in range(0, len(own), size):
            part, cost = self._collect(own[start : start + size], law)
            parts.append(part)
            ledger.add(cost)
        self.weigh(parts, prompts)
        steps = self._trained(parts[0].trajectory)
        self.on_policy = True
        for _ in range(self.config.num_inner_epochs):
            for part in parts:
                sums, cost = self.minimise(part, law, steps)
                ledger.add(cost)
                # Means are over the samples of the whole step, and this is one of its parts.
                sums = {name: value * self.config.num_minibatches for name, value in (part.sums | sums).items()}
                yield sums, ledger
                ledger, self.on_policy = Ledger(), False

    def micro_batches(self, count: int) -> Iterator[slice]:
        """Rows that are sampled, scored and differentiated together."""
        size = count if self.training.micro_batch_size == "auto" else self.training.micro_batch_size
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def sample(self, prompts: Sequence[Prompt], condition: Condition, law: Law, size: int | None) -> Trajectory:
        """Sample the groups of some prompts, `size` rows at once; `condition` has a row for each sample."""
        return rollout(
            self.policy,
            condition,
            law,
            self.schedule,
            rows=[(p.id, self.step, i) for p in prompts for i in range(self.training.group_size)],
            seed=self.training.seed,
            guidance_scale=self.guidance_scale,
            micro_batch_size=size,
            record_states=True,
            record_transitions=True,
        )

    @torch.no_grad()
    def _collect(self, prompts: Sequence[Prompt], law: Law) -> tuple[Part, Ledger]:
        """Sample and score the groups of some prompts."""
        of_each = [p for p in prompts for _ in range(self.training.group_size)]
        condition = self.policy.encode([p.text for p in of_each])
        size = None if self.training.micro_batch_size == "auto" else self.training.micro_batch_size
        trajectory = self.sample(prompts, condition, law, size)
        # A reward that compares the samples of a prompt has to see them all; others see micro-batches.
        slices = [slice(0, len(of_each))] if self.reward.groupwise else list(self.micro_batches(len(of_each)))
        scores = [self._score(trajectory.latents[rows], of_each[rows]) for rows in slices]
        values, sums = torch.cat([value for value, _ in scores]), {}
        for _, each in scores:
            sums = {name: sums.get(name, 0) + value for name, value in each.items()}
        ledger = trajectory.ledger
        ledger.decodes += len(of_each)
        ledger.reward_calls += len(of_each)
        ledger.reward_failures += int(values.isnan().sum())
        return Part(of_each, condition, trajectory, values, sums), ledger

    def _score(self, latents: Tensor, prompts: list[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of the 8-bit pixels that a user would save, NaN where they failed, and sums of what is reported."""
        pixels = media.quantise(self.policy.decode(latents))
        score = self.reward(pixels, [p.text for p in prompts], [p.metadata for p in prompts])
        parts = {"reward": score.value} | {f"reward/{name}": part for name, part in score.parts.items()}
        sums = {name: torch.where(score.valid, part, torch.zeros_like(part)).sum() for name, part in parts.items()}
        value = score.value.double().masked_fill(~score.valid, math.nan).cpu()
        return value, sums | {"reward_valid": score.valid.sum()}

    def _trained(self, trajectory: Trajectory) -> list[int]:
        """The steps that this training step trains on, ascending: of those with noise the chosen share."""
        steps = trajectory.stochastic.nonzero().flatten().tolist()
        if not steps:
            raise ValueError("no step of this chain draws noise, so none has a density: raise num_inference_steps")
        count = max(1, round(self.config.timestep_fraction * len(steps)))
        order = generator(self.training.seed, "timesteps", self.step).permutation(len(steps))[:count]
        return [steps[i] for i in sorted(order.tolist())]
