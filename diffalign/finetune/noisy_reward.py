r"""Learning a reward of noisy latents from choices between samples, for noisy reward guidance.

With G samples x^1 .. x^G of a prompt c, one level t and one noise z for all of them, and P of a pair's outcome by
Bradley-Terry with ties,

    minimise  - E_{c, t, z} mean_{i < j} log P(outcome_ij | r(x_t^i, t, c) - r(x_t^j, t, c)),
    x_t = alpha_t x_0 + sigma_t z,

for each objective, over its head alone. Levels are those of the policy's own schedule, its result (t = 0) included,
each as often as the others: where the scheduler shifts, so do they.

Source: Liu et al. 2025 (VideoAlign; arXiv 2501.13918), section 4.4, whose pairs have the same noise and time too.
`diffalign.rewards.noisy.reward` tells what is known of its network. Departures of the training:

- All pairs of a prompt's G samples share one noise and one reading by the frozen blocks. The paper's pairs are G = 2.
- Ties are in the likelihood, with a learned threshold. The paper's pixel reward has them at a fixed one (k = 5); of its
  noisy reward the loss is told as Bradley-Terry.
- Only the heads learn, at a rate that suits them; the paper tunes all weights at 5e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.config import TrainingConfig
from diffalign.finetune.noisy_reward_config import NoisyRewardConfig
from diffalign.finetune.trainer import Row, StepFailed, Trainer
from diffalign.laws import Level
from diffalign.ledger import Ledger
from diffalign.noise import generator, normal
from diffalign.processes import process_state
from diffalign.rewards import noisy


def refuse_regularisers(training: TrainingConfig) -> None:
    """Raises ValueError where settings are to hold a policy: none is trained."""
    for name in ("sft", "weight_l2"):
        if getattr(training, name):
            raise ValueError(f"{name} holds a policy near its base, and noisy_reward trains none: leave it out")


class NoisyRewardTrainer(Trainer):
    """Trains the heads of a `NoisyReward` on `Choices`: ``trainer.train(trainer.prompts, steps=300)``.

    A step takes `num_prompts_per_step` prompts with all their samples.

    Args:
        reward: its heads learn; the policy under it does not change.
        choices: to learn from.
        **settings: the fields of `TrainingConfig` and of `NoisyRewardConfig`; `group_size` is that of the choices, and
            what says how samples are made has no effect here.

    Raises:
        ValueError: the choices are by another number of objectives, or settings ask for what holds a policy.
    """

    config_class = NoisyRewardConfig
    config: NoisyRewardConfig

    def __init__(self, reward: noisy.NoisyReward, choices: noisy.Choices, **settings: Any) -> None:
        # Trainer's own trains an adapter by a reward of pixels; here the reward is what learns.
        shared = {k: settings.pop(k) for k in list(settings) if k in TrainingConfig.model_fields}
        shared["group_size"] = choices.latents.shape[1]
        self.training = TrainingConfig(**shared)
        refuse_regularisers(self.training)
        self.config = NoisyRewardConfig(**settings)
        if choices.outcome.shape[2] != len(reward.objectives):
            raise ValueError(
                f"choices by {choices.outcome.shape[2]} objectives for a reward of {len(reward.objectives)}, "
                f"{', '.join(reward.objectives)}: give one outcome for each"
            )
        self.policy = reward.policy
        self.learner = reward
        self.choices = choices
        self.prompts = [Prompt(text, i) for i, text in enumerate(choices.prompts)]
        self.schedule = self.policy.schedule(noisy.LEVELS)
        process_state()
        self.accelerator = Accelerator(mixed_precision=self.training.mixed_precision)
        self._learn(list(reward.heads.requires_grad_(True).parameters()))

    def accumulate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], Ledger]:
        """One reading without gradient by the frozen blocks, and a backward pass through the heads."""
        rows = [int(p.id) for p in prompts]
        latents = self.choices.latents[rows]
        x, level = noisy.noised(self.learner, latents, self.level(rows), self.noise(rows))
        with torch.no_grad():
            condition = self.policy.encode([p.text for p in prompts for _ in range(self.training.group_size)])
            tokens, time = self.learner.trunk(x, level, condition)
        scores = self.learner.judge(tokens, time).unflatten(0, (len(rows), -1))
        outcome = self.choices.outcome[rows].to(scores)
        surprise, right = self._surprise(noisy.margin(scores), outcome)
        objective = surprise.sum() / self.training.num_prompts_per_step
        objective.backward()
        ledger = Ledger(denoiser_evaluations=len(x))
        # Trainer divides by images, and these are means over the pairs of a prompt.
        sums = {"loss": surprise.sum(), **dict(zip(self._names(), right.sum(0), strict=True))}
        return {name: v.detach() * self.training.group_size for name, v in sums.items()}, ledger

    def level(self, rows: Sequence[int]) -> Level:
        """The level of each prompt at this step, (P,)."""
        count = len(self.schedule)
        if self.config.levels == "clean":
            return self.schedule.level(torch.full((len(rows),), count), self.policy.device)
        seed, step = self.training.seed, self.step
        drawn = [int(generator(seed, "noisy-reward-level", row, step).integers(count + 1)) for row in rows]
        return self.schedule.level(torch.tensor(drawn), self.policy.device)

    def noise(self, rows: Sequence[int]) -> Tensor:
        """The noise of each prompt at this step, for all of its samples, (P, C, h, w)."""
        where = {"device": self.policy.device, "dtype": self.policy.state_dtype}
        shape, at = self.choices.latents.shape[2:], [(row, self.step) for row in rows]
        return normal(shape, seed=self.training.seed, purpose="noisy-reward", rows=at, **where)

    def _surprise(self, margins: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) nats a judged pair, summed over objectives; and (P, K) share of decided pairs ranked right."""
        told, decided = ~outcome.isnan(), outcome.abs() == 1
        known = torch.where(told, outcome, 0.0)
        nats = -self.learner.log_probability(margins, known)
        surprise = torch.where(told, nats, 0.0).sum(1) / told.sum(1).clamp(min=1)
        right = torch.where(decided, (margins.sign() == known).to(nats), 0.0).sum(1) / decided.sum(1).clamp(min=1)
        return surprise.sum(1), right

    def _names(self) -> list[str]:
        return [f"agreement/{name}" for name in self.learner.objectives]

    def _refuse(self, row: Row) -> None:
        """Raises StepFailed for a gradient that is not finite; the numbers are the same on every process."""
        if not row["grad_norm"] < float("inf"):
            raise StepFailed(
                f"step {self.step + 1}: the gradient is not finite (loss {row['loss']:.4g}); the weights are "
                "unchanged. Lower learning_rate, or look for latents that are not finite"
            )

    def _rewards(self) -> list[Any]:
        return []  # none of pixels is told of its means

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to be bit-equal."""
        heads = {name: t.detach() for name, t in self.learner.heads.state_dict().items()}
        return self._progress() | {"heads": heads}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; ValueError for heads of another recipe."""
        try:
            self.learner.heads.load_state_dict(state["heads"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's heads and this recipe's differ: {error}") from error
        self._load_progress(state)
