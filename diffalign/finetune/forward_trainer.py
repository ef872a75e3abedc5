"""The methods that learn from final samples: each is noised anew, and the policy trained to denoise it, by its weight.

    L = mean over samples i and draws (t, noise) of  w_i e(x_t, t, c) + kl_weight D,   x_t = alpha_t x_0 + sigma_t noise

with e the denoising error of `forward`, w_i a weight from the rewards of the sample's group, and D the mean square of
the difference of the predictions of policy and reference (adapter off) at x_t, averaged over the trained samples of
each prompt. Neither the states in between nor densities are needed: the sampler is the ODE unless `eta` says otherwise,
and what is noised is the latent as it was sampled, which never went through the VAE.

Of K = `timesteps_per_sample` draws in one update the k-th is at the share (k + u) / K of the levels, u uniform: spread
over all of them, and each uniform on average.

Training predictions have no classifier-free guidance, as in the papers: the loss is that of pre-training. Samples that
were drawn with guidance pull them to where it led, and it then leads further: with `guidance_scale` above 1 steps
compound. A denoiser that reads the scale instead is told that of sampling, and has no such trouble.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.forward import denoising_error, training_level
from diffalign.finetune.forward_config import ForwardConfig
from diffalign.finetune.online import OnlineTrainer, Part
from diffalign.laws import Level, Prediction, default_law
from diffalign.laws.prediction import noised
from diffalign.ledger import Ledger
from diffalign.noise import normal, uniform
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import Trajectory, rollout
from diffalign.settings import EVERY_STEP


@dataclass(eq=False)
class Draw:
    """Samples, each with a level and a noise: what one evaluation of the denoiser sees.

    Attributes:
        latents: (B, C, h, w) the clean ones, x_0.
        noise: (B, C, h, w)
        level: (B,)
        condition: theirs.
        weight: (B,) of each sample.
    """

    latents: Tensor
    noise: Tensor
    level: Level
    condition: Condition
    weight: Tensor

    @cached_property
    def x(self) -> Tensor:
        """(B, C, h, w) the noised latents, x_t."""
        return noised(self.latents, self.noise, self.level)


class ForwardTrainer(OnlineTrainer):
    """What RAFT, RWR and DiffusionNFT share. Settings: `TrainingConfig`, `ForwardConfig` and the method's own.

    A method writes `weights`, and `loss` where it is not the weighted denoising error.
    """

    config: ForwardConfig
    evaluations: ClassVar[int] = 1
    """Denoiser evaluations of a sample in `loss` and its prediction."""

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        scale = self.config.guidance_scale
        guides_itself = policy.evaluations_per_prediction(scale) == 1
        self.embedded_guidance = scale if guides_itself else 1.0
        if guides_itself and scale > 1 and self.config.guidance_interval != EVERY_STEP:
            raise ValueError(
                f"guidance_interval = {self.config.guidance_interval} with a denoiser that embeds the scale: it is "
                "trained at one scale for all levels; leave the interval out"
            )

    @abstractmethod
    def weights(self, rewards: Tensor) -> Tensor:
        """From rewards (P, G) of all processes, NaN where a score failed, to weights (P, G)."""

    def trained(self, weights: Tensor) -> Tensor:
        """Which samples (B,) are trained on: those that have a weight. The others cost no evaluation."""
        return weights.nan_to_num(0.0).ne(0)

    def loss(self, prediction: Prediction, draw: Draw) -> Tensor:
        """(B,) of each sample."""
        return draw.weight * denoising_error(prediction, draw.latents, draw.noise)

    def sample(self, prompts: Sequence[Prompt], condition: Condition) -> Trajectory:
        """Groups from noises of their own, final latents only."""
        return rollout(
            self.policy,
            condition,
            default_law(self.schedule.kind, self.config.eta),
            self.schedule,
            rows=self.addresses(prompts),
            seed=self.training.seed,
            guidance_scale=self.guidance_scale,
            micro_batch_size=self.rows_at_once(len(condition)),
        )

    def weigh(self, parts: list[Part], prompts: Sequence[Prompt]) -> None:
        """Turn the step's rewards to weights."""
        weights_of_all = self.weights(self.rewards_of(parts))
        for part, weights in zip(parts, self.own(weights_of_all, parts), strict=True):
            part.advantages = weights

    def minimise(self, part: Part) -> tuple[dict[str, Tensor], Ledger]:
        """One evaluation with gradient for each trained sample and draw."""
        assert part.advantages is not None
        weights, trained = part.advantages, self.trained(part.advantages)
        # In the distance to the reference prompts count alike, however many of their samples are trained on.
        grouped = trained.double().reshape(-1, self.training.group_size)
        shares = (grouped / grouped.mean(1, keepdim=True).clamp(min=1e-9)).flatten()
        rows = trained.nonzero().flatten()
        if self.policy.blocks_are_sharded:
            rows = torch.arange(len(part))
        zero = torch.zeros((), device=self.policy.device)
        sums = dict.fromkeys(("loss", "prediction_mse") if self.config.kl_weight else ("loss",), zero)
        items = torch.cartesian_prod(rows, torch.arange(self.config.timesteps_per_sample))
        for chunk in items.split(self.rows_at_once(len(part))):
            if not len(chunk):
                continue
            found = self._backward(self.draw(part, *chunk.unbind(1), weights), shares[chunk[:, 0]])
            sums = {name: value + found[name] / self.config.timesteps_per_sample for name, value in sums.items()}
        reference = 1 if self.config.kl_weight else 0
        ledger = Ledger(denoiser_evaluations=len(items) * (self.evaluations + reference), backward_passes=len(items))
        return sums | {"trained": trained.sum()}, ledger

    def draw(self, part: Part, rows: Tensor, draws: Tensor, weights: Tensor) -> Draw:
        """Samples of a part at their draws.

        Args:
            part: the samples.
            rows: (N,) which ones.
            draws: (N,) which draw of each, 0 .. K - 1.
            weights: (B,) of all samples of the part.
        """
        latents, weight = part.trajectory.latents[rows], weights[rows].nan_to_num(0.0)
        at = [(part.prompts[i].id, self.step, i % self.training.group_size, part.passes) for i in rows.tolist()]
        where = {"seed": self.training.seed, "purpose": "forward", "rows": at, "step": draws.tolist()}
        noise = normal(latents.shape[1:], device=self.policy.device, dtype=latents.dtype, **where)
        u = (draws + uniform((), **where)) / self.config.timesteps_per_sample
        level = self.level(u.clamp(max=1 - 2**-53))
        return Draw(latents, noise, level, part.condition.rows(rows), weight.to(latents))

    def level(self, u: Tensor) -> Level:
        """The levels (N,) at shares (N,) in [0, 1) of those that are trained at."""
        if self.config.levels == "uniform":
            return training_level(self.policy, u)
        return self.schedule.level((u * len(self.schedule)).long(), self.policy.device)

    def predict(self, draw: Draw) -> Prediction:
        """The policy's prediction of a draw, without guidance."""
        return self.policy.predict(draw.x, draw.level, draw.condition, self.embedded_guidance)

    def _backward(self, draw: Draw, shares: Tensor) -> dict[str, Tensor]:
        """Gradient of some samples at one draw, by `shares` above 0; sums over them of what is reported."""
        found, reference = {}, None
        if self.config.kl_weight:
            with torch.no_grad(), self.policy.reference():
                reference = self.predict(draw)
        prediction = self.predict(draw)
        loss = self.loss(prediction, draw)
        total = torch.where(shares.to(loss) > 0, loss, 0.0).sum()
        if reference is not None:
            distance = prediction.square_distance(reference)
            found["prediction_mse"] = (shares.to(distance) * distance).sum()
            total = total + self.config.kl_weight * found["prediction_mse"]
        (total / (self.images * self.config.timesteps_per_sample)).backward()
        return {name: value.detach() for name, value in (found | {"loss": total}).items()}

    def probe(self, prompts: Sequence[Prompt]) -> int:
        """Samples, scores, and the gradient of one draw of all of them."""
        part, _ = self.collect(prompts)
        rows, ones = torch.arange(len(part)), torch.ones(len(part))
        self._backward(self.draw(part, rows, torch.zeros_like(rows), ones), ones)
        return part.bytes_per_image
