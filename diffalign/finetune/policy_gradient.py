r"""The clipped policy gradient over the steps of the chain that DDPO and Flow-GRPO share.

With A_i the advantage of sample i and rho = p_theta(x_s | x_t, c) / p_old(x_s | x_t, c) the ratio of a step,

    L = mean_i mean_t [ max(-A_i rho, -A_i clip(rho, 1 - clip_range, 1 + clip_range)) + kl_weight KL_t
                        + chi2_weight chi^2_t ],
    KL_t = KL(p_theta(. | x_t, c) || p_ref(. | x_t, c)), and chi^2_t likewise, in closed form.

The gradient of a divergence is not that of its steps alone: where an early step leads says what later ones cost. So the
advantage of a step is A_i less D (kl_weight KL + chi2_weight chi^2) of all later steps, about its mean over the others
of the group; D is the number of elements with `reduction: mean` and 1 with `sum`. Departure: Flow-GRPO, DPOK and the
codes with a KL in the loss leave this out, and come to rest beside the optimum. Steps below `min_std` are neither
trained nor charged.

Near the reference chi^2 is twice the KL, and far away it grows exponentially: what it bounds is how far a learned
reward can be off on the policy's samples (Laidlaw et al. 2024, Correlated Proxies, arXiv 2403.03185). Departure: they
take the root of the divergence of whole trajectories, estimated on samples; this is the mean over steps, exact.

Logarithms are subtracted element by element before they are reduced, on states as they were stored. With
`reduction: mean`, as in the papers, rho is the true ratio to the power 1 / D for a latent of D elements: their clip
ranges mean something with it only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.advantages import ADVANTAGES, rloo
from diffalign.finetune.online import Part
from diffalign.finetune.trajectory import TrajectoryTrainer
from diffalign.finetune.trajectory_config import PolicyGradientConfig
from diffalign.laws import Normal
from diffalign.ledger import Ledger
from diffalign.noise import generator
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import Trajectory


class PolicyGradient(TrajectoryTrainer):
    """Trains by advantages and clipped ratios; a subclass may say how each is made."""

    config: PolicyGradientConfig

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        loud = len(self.loud_steps(self.within()))
        if self.regularised and loud > 1 and self._count_trained(loud) == 1:
            raise ValueError(
                f"timestep_fraction = {self.config.timestep_fraction:g} trains one of {loud} steps, and what later "
                "ones diverge is then unknown: with kl_weight or chi2_weight raise it"
            )

    def advantages(self, rewards: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """From rewards (P, G) of all processes to advantages (P, G), NaN or 0 where a score failed."""
        return ADVANTAGES[self.config.advantage](rewards)

    def log_ratio(self, now: Normal, old: Normal, x: Tensor) -> Tensor:
        """Log rho (B,) of a step to x."""
        return now.log_ratio(x, old, self.config.reduction, validate=False)

    def policy_loss(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Elementwise, (B,)."""
        ratio, clip = log_ratio.exp(), self.config.clip_range
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))

    @property
    def regularised(self) -> bool:
        """Whether the reference is evaluated."""
        return self.config.kl_weight > 0 or self.config.chi2_weight > 0

    @property
    def compares(self) -> bool:
        """Not where the whole step is the measure."""
        return self.config.advantage != "batch"

    def weigh(self, parts: list[Part], prompts: Sequence[Prompt]) -> None:
        """Turn the step's rewards to advantages."""
        most = self.config.max_advantage
        advantages = self.advantages(self.rewards_of(parts), prompts).nan_to_num(0.0).clamp(-most, most)
        for part, own in zip(parts, self.own(advantages, parts), strict=True):
            part.advantages = own

    def trained(self, trajectory: Trajectory) -> list[int]:
        """Of the loud steps the chosen share."""
        steps = super().trained(trajectory)
        order = generator(self.training.seed, "timesteps", self.step).permutation(len(steps))
        return [steps[i] for i in sorted(order[: self._count_trained(len(steps))].tolist())]

    def _count_trained(self, loud: int) -> int:
        """Of so many steps how many are trained on."""
        return max(1, round(self.config.timestep_fraction * loud))

    def minimise(self, part: Part) -> tuple[dict[str, Tensor], Ledger]:
        """One evaluation with gradient for each step and sample that has an advantage, or is held to the reference."""
        assert part.advantages is not None
        steps, loud = self.trained(part.trajectory), len(self.loud_steps(part.trajectory.stochastic))
        flat = part.advantages.reshape(-1, self.training.group_size).eq(0).all(1)
        zero = torch.zeros((), device=self.policy.device)
        names = ("loss", "ratio", "clip_fraction", *(("kl",) if self.regularised else ()))
        names += ("chi2",) if self.config.chi2_weight else ()
        sums, ledger = dict.fromkeys(names, zero), Ledger()
        advantages, scored = part.advantages.to(zero), ~part.rewards.isnan()
        needed = part.advantages.ne(0) | (scored & self.regularised) | self.policy.blocks_are_sharded
        index, count = needed.nonzero().flatten().to(zero.device), int(needed.sum())
        kept = slice(None) if count == len(part) else index
        trajectory, condition = part.trajectory.rows(kept), part.condition.rows(kept)
        scored = scored.to(zero.device)
        later = torch.zeros_like(advantages).masked_fill(~scored, torch.nan)  # what the steps after this one cost
        for step in reversed(steps):
            # Given that this step is trained, each later one is with the probability (n - 1) / (N - 1).
            charged = advantages - self._about_others(later) * (loud - 1) / max(len(steps) - 1, 1)
            cost = self.policy.evaluations_per_prediction(self.scale(step)) * count
            for rows in self.micro_batches(count):
                found = self._step(trajectory.rows(rows), condition.rows(rows), step, charged[kept][rows])
                # With FSDP failed ones are evaluated too.
                found = {name: value.where(scored[kept][rows], zero) for name, value in found.items()}
                (found["loss"].sum() / (self.images * len(steps))).backward()
                later[index[rows]] += found["cost"]
                sums = {name: value + found[name].detach().sum() / len(steps) for name, value in sums.items()}
            ledger.denoiser_evaluations += cost * (2 if self.regularised else 1)
            ledger.backward_passes += cost
        for name in ("ratio", "clip_fraction"):  # of what was evaluated; where nothing was, nothing has moved
            sums[name] = sums[name] * len(part) / count if count else zero + len(part) * (name == "ratio")
        return sums | {"zero_variance": flat.sum() * self.training.group_size}, ledger

    def _about_others(self, costs: Tensor) -> Tensor:
        """Costs (B,) less the mean of the others of each group, in a group of one as they are; 0 where they are NaN."""
        group = self.training.group_size
        return (costs if group == 1 else rloo(costs.reshape(-1, group)).flatten()).nan_to_num(0.0)

    def _step(self, trajectory: Trajectory, condition: Condition, step: int, advantage: Tensor) -> dict[str, Tensor]:
        """(B,) each: the loss at one step, with its graph, what is reported, and what its divergence costs."""
        now = self.transition(trajectory, condition, step)
        x, old = trajectory.states[step + 1], trajectory.transitions[step]  # type: ignore[index]
        log_ratio = self.log_ratio(now, old, x)
        loss = self.policy_loss(log_ratio, advantage)
        kl = chi2 = torch.zeros_like(loss)
        if self.regularised:
            with torch.no_grad(), self.policy.reference():
                reference = self.transition(trajectory, condition, step)
            kl = now.kl(reference, self.config.reduction, validate=False)
            if self.config.chi2_weight:  # it can be infinite
                chi2 = now.chi2(reference, self.config.reduction, validate=False)
        divergence = self.config.kl_weight * kl + self.config.chi2_weight * chi2
        elements = x[0].numel() if self.config.reduction == "mean" else 1
        ratio = log_ratio.detach().exp()
        return {
            "loss": loss + divergence,
            "kl": kl,
            "chi2": chi2,
            "ratio": ratio,
            "clip_fraction": ((ratio - 1).abs() > self.config.clip_range).to(ratio),
            "cost": elements * divergence.detach(),
        }
