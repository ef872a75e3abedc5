"""The loop of the methods that learn from scores of their own samples: sample, score, and update on what was sampled.

A training step draws `group_size` samples of each prompt without gradient, scores the images, and makes
`num_inner_epochs` x `num_minibatches` optimiser updates. A method writes `sample`, how samples are drawn and what is
kept of them; `weigh`, which sees the rewards of the whole step; and `minimise`, the gradient of one part. Nothing
outlives the step, so that a checkpoint between two steps is whole without samples.
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
from diffalign.finetune.online_config import OnlineConfig
from diffalign.finetune.trainer import Trainer, reward_sums
from diffalign.laws import Normal
from diffalign.ledger import Ledger
from diffalign.noise import Address
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward, pooled
from diffalign.rollout import Trajectory, in_interval


@dataclass(eq=False)
class Part:
    """The samples of one minibatch: whole groups, one after another.

    Attributes:
        prompts: (B,) of each sample.
        condition: theirs.
        trajectory: what `sample` recorded of them.
        rewards: (B,) float64 on the host, NaN where the score failed.
        sums: of what is reported of rewards, over the samples.
        features: by the name of a set reward what it saw of the samples, (B, D), NaN where that failed.
        advantages: (B,) on the host, of methods that weigh their samples.
        passes: how often it has been trained on before.
        pairs: of PRDP and DRAGON, over all processes; of unpaired samples half their number.
        reference: of PRDP, the reference's Gaussian of each trained step.
    """

    prompts: list[Prompt]
    condition: Condition
    trajectory: Trajectory
    rewards: Tensor
    sums: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    passes: int = 0
    pairs: float = 0
    reference: dict[int, Normal] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def bytes_per_image(self) -> int:
        """What stays of a sample from its rollout to its last update: latents, Gaussians and the encoded prompt."""
        states, gaussians = self.trajectory.states or [self.trajectory.latents], self.trajectory.transitions or []
        tensors = [*states, *(n.mean for n in gaussians if n is not None), *self.condition.tensors.values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) // len(self)


class OnlineTrainer(Trainer):
    """What trajectory and forward methods share. Settings: `TrainingConfig`, `OnlineConfig` and the method's own.

    Attributes:
        on_policy: whether the weights are those that drew the step's samples, as they are until its first update.

    Raises ValueError at once for prompts that do not divide into the minibatches, and for groups of one where the
    method compares samples of a group.
    """

    config: OnlineConfig
    on_policy = False

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        count = self.training.num_prompts_per_step // self.accelerator.num_processes
        if count % self.config.num_minibatches:
            raise ValueError(
                f"num_minibatches = {self.config.num_minibatches} does not divide the {count} prompts of a process: "
                "use a divisor"
            )
        if self.compares and self.training.group_size < 2:
            raise ValueError(
                f"group_size = {self.training.group_size}, and {self.config.name} compares the samples of a prompt: "  # type: ignore[attr-defined]
                "use 2 or more"
            )
        self.schedule = policy.schedule(self.config.num_inference_steps)
        self.guidance_scale = in_interval(self.config.guidance_scale, len(self.schedule), self.config.guidance_interval)

    @property
    def compares(self) -> bool:
        """Whether a sample means something beside others of its prompt alone."""
        return True

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], condition: Condition) -> Trajectory:
        """Sample the groups of some prompts without gradient; `condition` has a row for each sample."""

    @abstractmethod
    def weigh(self, parts: list[Part], prompts: Sequence[Prompt]) -> None:
        """Look at the rewards of the whole step before its first update; `prompts` are those of all processes."""

    @abstractmethod
    def minimise(self, part: Part) -> tuple[dict[str, Tensor], Ledger]:
        """Add the gradient of the loss of one part, divided by `self.images` as in `accumulate`; sums and cost."""

    @property
    def images(self) -> int:
        """Samples of one update, of all processes."""
        return super().images // self.config.num_minibatches

    def addresses(self, prompts: Sequence[Prompt]) -> list[Address]:
        """The noise address of each sample of some prompts."""
        return [(p.id, self.step, i) for p in prompts for i in range(self.training.group_size)]

    def updates(self, prompts: Sequence[Prompt]) -> Iterator[tuple[dict[str, Tensor], Ledger]]:
        """Sample and score once, then one update after another."""
        own = self.share(prompts)
        size = len(own) // self.config.num_minibatches
        parts, ledger = [], Ledger()
        for start in range(0, len(own), size):
            part, cost = self.collect(own[start : start + size])
            parts.append(part)
            ledger.add(cost)
        self.weigh(parts, prompts)
        # Of the whole step, so that one minibatch without any score is no failure.
        scored = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
        self.on_policy = True
        for _ in range(self.config.num_inner_epochs):
            for part in parts:
                sums, cost = self.minimise(part)
                part.passes += 1
                ledger.add(cost)
                # Means are over the samples of the whole step, and this is one of its parts.
                yield scored | {name: value * self.config.num_minibatches for name, value in sums.items()}, ledger
                ledger, self.on_policy = Ledger(), False

    @torch.no_grad()
    def collect(self, prompts: Sequence[Prompt]) -> tuple[Part, Ledger]:
        """Sample and score the groups of some prompts. Of a failed sample nothing is kept that may not be finite."""
        of_each = [p for p in prompts for _ in range(self.training.group_size)]
        condition = self.policy.encode([p.text for p in of_each])
        trajectory = self.sample(prompts, condition)
        # A reward that compares the samples of a prompt has to see them all; others see micro-batches.
        slices = [slice(0, len(of_each))] if self.reward.groupwise else list(self.micro_batches(len(of_each)))
        with pooled(self.accelerator.gather, self.accelerator.process_index) as pool:
            scores = [self._score(trajectory.latents[rows], of_each[rows]) for rows in slices]
        values, sums = torch.cat([value for value, _ in scores]), {}
        for _, each in scores:
            sums = {name: sums.get(name, 0) + value for name, value in each.items()}
        if values.isnan().any():  # with FSDP they are evaluated too, at a weight of 0
            trajectory.clear_(values.isnan())
        ledger = trajectory.ledger
        ledger.decodes += len(of_each)
        ledger.reward_calls += len(of_each)
        ledger.reward_failures += int(values.isnan().sum())
        return Part(of_each, condition, trajectory, values, sums, pool.features), ledger

    def _score(self, latents: Tensor, prompts: list[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of the 8-bit pixels that a user would save, NaN where they failed, and sums of what is reported."""
        parts = [self.policy.decode(latents[rows]) for rows in self.micro_batches(len(latents))]
        pixels = media.quantise(torch.cat(parts))
        score = self.reward(pixels, [p.text for p in prompts], [p.metadata for p in prompts])
        value = score.value.double().masked_fill(~score.valid, math.nan).cpu()
        return value, reward_sums(score)

    def rewards_of(self, parts: list[Part]) -> Tensor:
        """The rewards (P, G) of all processes, in the order of the step's prompts; on every process the same."""
        return self.gathered(torch.cat([part.rewards for part in parts]))

    def own(self, values: Tensor, parts: list[Part]) -> list[Tensor]:
        """Of values (P, G) of all processes what belongs to this one's parts, (B,) each."""
        group, world = self.training.group_size, self.accelerator.num_processes
        mine = values.reshape(-1, world, group)[:, self.accelerator.process_index].flatten()
        return list(mine.split([len(part) for part in parts]))

    def gathered(self, values: Tensor) -> Tensor:
        """What each process knows of its samples, (B, ...), of all of them, (P, G, ...) float64 on the host.

        Prompts are in the order of the step: process r has r, r + world, ...
        """
        shape = (self.training.group_size, *values.shape[1:])
        gathered = self.accelerator.gather(values.to(self.policy.device, torch.float32)).cpu().double()
        return gathered.reshape(self.accelerator.num_processes, -1, *shape).transpose(0, 1).reshape(-1, *shape)
