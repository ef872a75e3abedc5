"""The methods that train on recorded trajectories: every state is kept, and the Gaussian that it was drawn from.

Those Gaussians are the old policy. On the first update the policy is the old one, and log-ratios are exactly 0 where
the same rows are evaluated together as in sampling: they are, but where samples that train nothing are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.online import OnlineTrainer
from diffalign.finetune.trajectory_config import TrajectoryConfig
from diffalign.laws import Law, Normal, default_law
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import Trajectory, rollout, transition
from diffalign.rollout.guidance import scale_at


class TrajectoryTrainer(OnlineTrainer):
    """What DDPO, Flow-GRPO and PRDP share. Settings: `TrainingConfig`, `TrajectoryConfig` and the method's own.

    Raises ValueError at once for what `OnlineTrainer` refuses, and for a law that the pipeline's schedule has not.
    """

    config: TrajectoryConfig

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        if not (self.law().stds(self.schedule) > 0).any():
            raise ValueError("no step of this chain draws noise, so none has a density: raise num_inference_steps")
        self.loud_steps(self.within())

    def law(self) -> Law:
        """The law of this training step's samples."""
        return default_law(self.schedule.kind, self.config.eta)

    def scale(self, step: int) -> float:
        """The guidance scale of a step."""
        return scale_at(self.guidance_scale, step)

    def sample(self, prompts: Sequence[Prompt], condition: Condition) -> Trajectory:
        """Groups from noises of their own, with states and transitions."""
        return rollout(
            self.policy,
            condition,
            self.law(),
            self.schedule,
            rows=self.addresses(prompts),
            seed=self.training.seed,
            guidance_scale=self.guidance_scale,
            micro_batch_size=self.rows_at_once(len(condition)),
            record_states=True,
            record_transitions=True,
        )

    def transition(self, trajectory: Trajectory, condition: Condition, step: int) -> Normal:
        """The policy's Gaussian of a recorded step."""
        return transition(
            self.policy,
            trajectory,
            condition,
            self.law(),
            self.schedule,
            step,
            guidance_scale=self.guidance_scale,
            micro_batch_size=self.rows_at_once(len(condition)),
        )

    def within(self) -> Tensor:
        """(N,) mask of the steps among which this training step trains, by default all."""
        return torch.ones(len(self.schedule), dtype=torch.bool)

    def loud_steps(self, among: Tensor) -> list[int]:
        """Of the steps of a mask (N,) those that draw noise, and at least `min_std`. ValueError where none does."""
        stds = self.law().stds(self.schedule).to(among.device)
        steps = (among & (stds > 0) & (stds >= self.config.min_std)).nonzero().flatten().tolist()
        if not steps:
            most = float(stds[among].max())
            raise ValueError(
                f"min_std = {self.config.min_std:g} leaves no step to train on, whose noise is {most:.3g} at most: "
                "lower it"
            )
        return steps

    def trained(self, trajectory: Trajectory) -> list[int]:
        """The steps that this training step trains on, ascending: by default all loud ones."""
        return self.loud_steps(trajectory.stochastic)

    def probe(self, prompts: Sequence[Prompt]) -> int:
        """Samples, scores, and the gradient of one step's density of all of them."""
        part, _ = self.collect(prompts)
        step = self.trained(part.trajectory)[-1]
        now = self.transition(part.trajectory, part.condition, step)
        state = part.trajectory.states[step + 1]  # type: ignore[index]
        now.log_prob(state, self.config.reduction, validate=False).sum().backward()
        return part.bytes_per_image
