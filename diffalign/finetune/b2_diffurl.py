r"""B²-DiffuRL: DDPO on branches of one trajectory, over a window of last steps that grows.

The reward of an image says little of its first steps. So

1. backward progressive training: only the last m of N steps are trained, with m from `window_start` N to N in the
   course of the training;
2. branch-based sampling: the samples of a prompt share the N - m steps before, so that what sets their rewards apart
   happened in the steps that are trained;
3. of a prompt's branches the best and the worst train, and only if their advantages reach a threshold; the loss is
   DDPO's.

The shared steps are evaluated once, and branches run in one batch.

Source: Hu et al. 2025, "Towards better alignment: training diffusion models with reinforcement learning against sparse
rewards" (B²-DiffuRL, CVPR), and the authors' code. Departures:

- Every training step has its window, m = floor(N (w + (1 - w) step / max_train_steps) + 1/2), where the code has 100
  stages. With w = 0.7 both begin with 14 of 20 steps.
- The advantage is that of `ddpo`, by default the history of the prompt; the code's is over eight stages.
- A step without any selected branch changes nothing; the code stops with an error.
- Between two groups of one prompt nothing is compared: they have ids of their own where prompts repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.ddpo import DDPO
from diffalign.finetune.trainer import TRAINERS
from diffalign.finetune.trajectory_config import B2DiffuRLConfig
from diffalign.policies import Condition
from diffalign.rollout import Trajectory, branched_rollout


def best_and_worst(advantages: Tensor, threshold: float) -> Tensor:
    """Advantages (P, G) of the best and the worst of each group that reach the threshold, 0 elsewhere.

    Of equal ones the first; NaN are neither. Of a group whose samples are all equal none is chosen.
    """
    places = torch.arange(advantages.shape[1])
    most, best = advantages.nan_to_num(-math.inf).max(1, keepdim=True)
    least, worst = advantages.nan_to_num(math.inf).min(1, keepdim=True)
    chosen = ((best == places) & (advantages >= threshold)) | ((worst == places) & (advantages <= -threshold))
    return torch.where(chosen & (most > least), advantages, 0.0)


@TRAINERS.register("b2_diffurl")
class B2DiffuRL(DDPO):
    """Trains the adapter by B²-DiffuRL; settings of `TrainingConfig` and `B2DiffuRLConfig`.

    Raises ValueError at once for groups of one, and where `min_std` leaves no step of the first window.
    """

    config_class = B2DiffuRLConfig
    config: B2DiffuRLConfig

    @property
    def compares(self) -> bool:
        """Always: of the branches the best and the worst train."""
        return True

    @property
    def window(self) -> int:
        """m, how many last steps this training step trains."""
        done = min(1.0, self.step / self.training.max_train_steps)
        share = self.config.window_start + (1 - self.config.window_start) * done
        return max(1, math.floor(share * len(self.schedule) + 0.5))

    def within(self) -> Tensor:
        """The window."""
        return torch.arange(len(self.schedule)) >= len(self.schedule) - self.window

    def sample(self, prompts: Sequence[Prompt], condition: Condition) -> Trajectory:
        """Branches of one trajectory for each prompt."""
        group = self.training.group_size
        return branched_rollout(
            self.policy,
            condition.rows(slice(None, None, group)),
            self.law(),
            self.schedule,
            rows=[(p.id, self.step) for p in prompts],
            branches=group,
            split=len(self.schedule) - self.window,
            seed=self.training.seed,
            guidance_scale=self.guidance_scale,
            micro_batch_size=self.rows_at_once(len(condition)),
        )

    def advantages(self, rewards: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """DDPO's, of the best and the worst branch."""
        return best_and_worst(super().advantages(rewards, prompts), self.config.select_threshold)
