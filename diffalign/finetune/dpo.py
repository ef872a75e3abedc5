r"""Direct preference optimisation on pairs that are on disk: Diffusion-DPO and Flow-DPO.

Of two images of a prompt c one was chosen, w, and one rejected, l. With e(x) the error of the policy's prediction of a
noised latent and e_ref(x) that of the reference (adapter off),

    minimise  - E log sigmoid( - beta_t / 2 [ (e(x_t^w) - e_ref(x_t^w)) - (e(x_t^l) - e_ref(x_t^l)) ] ),
    x_t = alpha_t x_0 + sigma_t noise,  with one t and one noise for both images of a pair.

Errors are *means* over a latent's d elements, as in the authors' code of Diffusion-DPO: with sums the same beta would
be d times as large. `beta` is constant, and absorbs T omega(lambda_t) of the derivation; `flow_dpo` can have
beta_t = beta (1 - t)^2 too (`beta_schedule: timestep`), which turns errors of velocities into errors of noise. The loss
is ln 2 at the first step. The *implicit reward* of an image is beta_t / 2 (e_ref - e), in nats of the choice.

`sft_weight` adds that much of the error e(x_t^w) of the chosen image. The margin alone can grow while both errors do,
and the policy then draws what was chosen worse than before; this term holds it, as the likelihood of the chosen answer
does in DPO of language models. Its gradient stands beside beta / 2 sigmoid(-margin) times the same one.

Sources: Wallace et al. 2024 (Diffusion-DPO, arXiv 2311.12908), equation 14; Liu et al. 2025 (VideoAlign, arXiv
2501.13918), section 4.1 (Flow-DPO), whose default beta = 500 stands here without knowing whether its norms are means;
for the term of the chosen one Pang et al. 2024 (arXiv 2404.19733) and Liu et al. 2024 (RPO, arXiv 2405.16436).

Needs pairs and no reward: the recipe's rewards judge. Cost of a pair and step: two denoiser evaluations with gradient
and two without; no sampling, no decoding.

Departures from the reference codes:
- The error is of what the network predicts. For epsilon that is the paper's; for a v-prediction it is alpha_t^-2 times
  the error of the noise, as a constant beta does for a flow. The authors' code refuses all but epsilon.
- The reference is the adapter switched off and not a second network. Where a recipe starts from a LoRA, that LoRA is
  not part of the reference, and the first loss is not ln 2.
- An image is encoded once, to the VAE's mode; the authors' code draws from the posterior at every step. It is cropped
  in the middle; nothing is flipped. Latents and encoded prompts stay in main memory, or on disk (`cache`).
- No prompt is dropped (the authors' code drops some), and no guidance is in the prediction: a denoiser that
  embeds the guidance scale is told 1.
- Few-step pipelines are trained at all levels; the authors' code for SDXL-Turbo takes its four.
- t is uniform: over a diffusion's training timesteps, over (0, 1) for a flow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.data import SIDES, Pair, Prompt, Side, TensorCache, content_digest, open_side, read_pairs
from diffalign.finetune.dpo_config import DiffusionDPOConfig, FlowDPOConfig
from diffalign.finetune.forward import errors_beside_reference, training_level
from diffalign.finetune.trainer import TRAINERS, Row, StepFailed, Trainer
from diffalign.laws import Level
from diffalign.laws.prediction import noised
from diffalign.ledger import Ledger
from diffalign.noise import normal, uniform
from diffalign.policies import Policy, StoredLatents
from diffalign.rewards import Reward

logger = logging.getLogger(__name__)


def unscored(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Stands where the loop keeps its reward: no image is scored, for the pairs have been judged."""
    return images.new_full((len(images),), torch.nan)


class PairTrainer(Trainer):
    """What the two methods share.

    Args:
        policy: the pipeline to train.
        reward: what a run judges its images by; it has no part in training, and may be None.
        pairs: a file that `read_pairs` reads, or what it returned.
        **settings: the fields of `TrainingConfig` and of the method's config. `num_prompts_per_step` and
            `micro_batch_size` count pairs.

    Attributes:
        pairs: by their address, which is the id of their prompt.
        prompts: to train on, one for each pair: `trainer.train(trainer.prompts)`.

    Raises:
        ValueError: the pipeline is of the other kind, `group_size` is not 1, or the file cannot be used.
    """

    config: DiffusionDPOConfig | FlowDPOConfig

    def __init__(
        self, policy: Policy, reward: Reward | None = None, *, pairs: str | Path | Sequence[Pair], **settings: Any
    ) -> None:
        file = str(pairs) if isinstance(pairs, str | Path) else "given as a list"
        super().__init__(policy, unscored, pairs=file, **settings)
        flow = policy.prediction_kind() == "velocity"
        if flow != isinstance(self.config, FlowDPOConfig):
            kind, other = ("a flow", "flow_dpo") if flow else ("a diffusion", "diffusion_dpo")
            raise ValueError(
                f"{policy.pipeline_class} is {kind}, and method {self.config.name} is not for one: use {other}"
            )
        if self.training.group_size != 1:
            raise ValueError(
                f"group_size = {self.training.group_size}: a pair has its two images; leave group_size at 1"
            )
        if isinstance(pairs, str | Path):
            pairs, left_out = read_pairs(pairs)
            logger.info("%s: %d pairs; %d ties or rows without a choice are left out", file, len(pairs), left_out)
        self.pairs = {pair.prompt.id: pair for pair in pairs}
        self.prompts = [pair.prompt for pair in pairs]
        cache = None if self.config.cache is None else TensorCache(self.config.cache)
        if cache is not None:
            policy.keep_prompts(cache)
        self._latents = StoredLatents(policy, cache)
        self._digests: dict[tuple[int | str, Side], str] = {}

    def accumulate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], Ledger]:
        """A backward pass for each micro-batch of pairs; what is returned are sums over pairs."""
        sums: dict[str, Tensor] = {}
        ledger = Ledger()
        for rows in self.micro_batches(len(prompts)):
            chunk = prompts[rows]
            part = self._backward(chunk)
            sums = {name: sums.get(name, 0) + value for name, value in part.items()}
            ledger.add(Ledger(denoiser_evaluations=4 * len(chunk), backward_passes=2 * len(chunk)))
        return sums, ledger

    def _backward(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Loss and gradient of some pairs; in a batch the chosen images come first."""
        chosen, rejected = self.latents(prompts).unbind(1)
        latents, noise = torch.cat([chosen, rejected]), self.noise(prompts).repeat(2, 1, 1, 1)
        half = self.level(prompts)
        level = half.rows(torch.arange(len(prompts), device=half.alpha.device).repeat(2))
        condition = self.policy.encode([prompt.text for prompt in prompts] * 2)
        x = noised(latents, noise, level)
        error, before, distance = errors_beside_reference(
            self.policy, lambda: self.policy.predict(x, level, condition), latents, noise
        )
        implicit = self.beta(level).to(error) / 2 * (before - error)
        margin = implicit[: len(prompts)] - implicit[len(prompts) :]
        loss = softplus(-margin) + self.config.sft_weight * error[: len(prompts)]
        (loss.sum() / self.training.num_prompts_per_step).backward()
        sums = {
            "loss": loss.sum(),
            "implicit_accuracy": ((margin > 0).sum() + (margin == 0).sum() / 2),
            "implicit_margin": margin.sum(),
            "implicit_chosen": implicit[: len(prompts)].sum(),
            "implicit_rejected": implicit[len(prompts) :].sum(),
            "prediction_mse": distance.sum() / 2,
        }
        return {name: value.detach() for name, value in sums.items()}

    def beta(self, level: Level) -> Tensor:
        """beta_t at levels (B,)."""
        weight = torch.full_like(level.alpha, self.config.beta)
        if isinstance(self.config, FlowDPOConfig) and self.config.beta_schedule == "timestep":
            weight = weight * level.alpha.square()  # alpha of a flow is 1 - t
        return weight

    def level(self, prompts: Sequence[Prompt]) -> Level:
        """The level (P,) of each pair at this step."""
        at = [(prompt.id, self.step) for prompt in prompts]
        return training_level(self.policy, uniform((), seed=self.training.seed, purpose="dpo", rows=at))

    def noise(self, prompts: Sequence[Prompt]) -> Tensor:
        """The noise (P, C, h, w) of each pair at this step, for both of its images."""
        where = {"device": self.policy.device, "dtype": self.policy.state_dtype}
        shape, at = self.policy.latent_shape(), [(prompt.id, self.step) for prompt in prompts]
        return normal(shape, seed=self.training.seed, purpose="dpo", rows=at, **where)

    def latents(self, prompts: Sequence[Prompt]) -> Tensor:
        """The clean latents of pairs, chosen first: (P, 2, C, h, w). Each image is opened and encoded once."""
        found = []
        for prompt in prompts:
            pair = self.pairs.get(prompt.id)
            if pair is None or pair.prompt.text != prompt.text:
                raise ValueError(f"prompt {prompt.text!r} is not that of a pair: train on trainer.prompts")
            found += [self._latents(self._digest(pair, side), partial(open_side, pair, side)) for side in SIDES]
        return torch.stack(found).unflatten(0, (len(prompts), 2)).to(self.policy.device)

    def _digest(self, pair: Pair, side: Side) -> str:
        at = (pair.prompt.id, side)
        if at not in self._digests:
            self._digests[at] = content_digest(getattr(pair, side))
        return self._digests[at]

    def _refuse(self, row: Row) -> None:
        """Raises StepFailed for a gradient that is not finite; the numbers are the same on every process."""
        if not math.isfinite(row["grad_norm"]):
            raise StepFailed(
                f"step {self.step + 1}: the gradient is not finite (loss {row['loss']:.4g}), so this update "
                "was not made. Lower learning_rate, or use a bfloat16 instead of a float16 base"
            )

    def _rewards(self) -> list[Reward]:
        return []  # none is told of its means


@TRAINERS.register("diffusion_dpo")
class DiffusionDPO(PairTrainer):
    """Diffusion-DPO on pairs; arguments as of `PairTrainer`, settings of `DiffusionDPOConfig`."""

    config_class = DiffusionDPOConfig


@TRAINERS.register("flow_dpo")
class FlowDPO(PairTrainer):
    """Flow-DPO on pairs; arguments as of `PairTrainer`, settings of `FlowDPOConfig`."""

    config_class = FlowDPOConfig
