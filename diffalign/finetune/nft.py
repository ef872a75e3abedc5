r"""DiffusionNFT: learns from good and from bad samples by the forward process, without densities or guidance.

A sample x_0 of the *old* policy is optimal with probability r, and the policy's prediction f and the old one's f_old
make two implicit policies

    f+ = (1 - beta) f_old + beta f          f- = (1 + beta) f_old - beta f,

of which the positive is fitted to samples that are optimal, and the negative to those that are not:

    L = (max_advantage / beta) [ r d(f+) + (1 - r) d(f-) ] + kl_weight D,
    d(g) = mean (x_0(g) - x_0)^2 / sg(mean |x_0(g) - x_0|),          r = 1/2 + 1/2 clip(A / max_advantage, -1, 1)

with x_0(g) the clean latent that the prediction g of x_t means, means over the elements of a latent, sg without
gradient, A the advantage and D as in `forward_trainer`. At f = f_old the gradient is that of the old policy's error
times (2 r - 1): towards good samples, away from bad ones. A sample of r = 1/2 holds the policy at the old one.

The old policy draws the samples. At first it is the policy; after each training step its adapter goes on as

    old <- eta old + (1 - eta) policy,      eta = min(old_decay, old_decay_rate (i - old_decay_start)), at least 0,

after i optimiser updates. The authors' two schedules are (0.5, 0.001, 0), the default, and (0.999, 0.0075, 75).

Source: Zheng et al. 2025, "DiffusionNFT: online diffusion reinforcement with forward process" (arXiv 2509.16117), and
the authors' code, whose constants the loss has: max_advantage / beta, and a floor of 1e-5 under the mean error.

Departures:
- The two policies are mixed from what the network predicts, whatever that is; the authors' predicts a velocity. At one
  x_t the clean latents, and so the loss, are the same for all.
- Each of K levels of the sampler is trained once; the code takes a random 9 of its 10, without the tenth.
- Groups are divided by the spread as it is, where the code adds 1e-4 to it.
- The weights that are saved and judged are those of the policy; the code judges their moving average: `ema_decay: 0.9`.
- A failed score trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.finetune.advantages import ADVANTAGES
from diffalign.finetune.forward_config import NFTConfig
from diffalign.finetune.forward_trainer import Draw, ForwardTrainer
from diffalign.finetune.trainer import TRAINERS
from diffalign.laws import Prediction
from diffalign.laws.prediction import at_least_fp32
from diffalign.ledger import Ledger
from diffalign.policies import Condition, Policy
from diffalign.rewards import Reward
from diffalign.rollout import Trajectory


def nft_loss(now: Prediction, old: Prediction, latents: Tensor, probability: Tensor, beta: float) -> Tensor:
    """(B,) r d(f+) + (1 - r) d(f-), without max_advantage / beta; see the file.

    Args:
        now: of the policy, with its graph.
        old: of the old policy, of the same x_t.
        latents: (B, C, h, w) the clean ones, x_0.
        probability: (B,) r, in [0, 1].
        beta: see the file.
    """
    f, f_old = at_least_fp32(now.output), at_least_fp32(old.output).detach()
    losses = []
    for output in ((1 - beta) * f_old + beta * f, (1 + beta) * f_old - beta * f):
        error = Prediction(output, now.x, now.level, now.kind).x0 - latents
        size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append(error.square().flatten(1).mean(1) / size)
    return probability * losses[0] + (1 - probability) * losses[1]


@TRAINERS.register("nft")
class NFT(ForwardTrainer):
    """Trains the adapter by DiffusionNFT; settings of `TrainingConfig` and `NFTConfig`. ValueError for groups of one.

    Attributes:
        old: the old policy's adapter, by the names of `Policy.trainable`.
    """

    config_class = NFTConfig
    config: NFTConfig
    evaluations = 2

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        self.old = {name: p.detach().clone() for name, p in policy.trainable().items()}

    def weights(self, rewards: Tensor) -> Tensor:
        """(P, G) -> (P, G) the probability of being optimal, NaN where the score failed."""
        advantages = ADVANTAGES[self.config.advantage](rewards).masked_fill(rewards.isnan(), torch.nan)
        return 0.5 + 0.5 * (advantages / self.config.max_advantage).clamp(-1, 1)

    def trained(self, weights: Tensor) -> Tensor:
        """All but failed scores: a probability of 0 is that of the worst samples."""
        return ~weights.isnan()

    def loss(self, prediction: Prediction, draw: Draw) -> Tensor:
        """(B,) max_advantage / beta times `nft_loss`."""
        with torch.no_grad(), self.old_policy():
            old = self.predict(draw)
        loss = nft_loss(prediction, old, draw.latents, draw.weight, self.config.beta)
        return self.config.max_advantage / self.config.beta * loss

    def sample(self, prompts: Sequence[Prompt], condition: Condition) -> Trajectory:
        """Groups of the old policy."""
        with self.old_policy():
            return super().sample(prompts, condition)

    def updates(self, prompts: Sequence[Prompt]) -> Iterator[tuple[dict[str, Tensor], Ledger]]:
        """Those of the loop; after the last of them the old policy follows."""
        yield from super().updates(prompts)
        decay = self.decay((self.step + 1) * self.config.num_inner_epochs * self.config.num_minibatches)
        for name, parameter in self.policy.trainable().items():
            self.old[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)

    def decay(self, updates: int) -> float:
        """What the old policy keeps of itself after so many optimiser updates."""
        return min(self.config.old_decay, self.config.old_decay_rate * max(updates - self.config.old_decay_start, 0))

    @contextmanager
    def old_policy(self) -> Iterator[None]:
        """Within the context the policy is the old one."""
        kept = {name: p.detach().clone() for name, p in self.policy.trainable().items()}
        self._put(self.old)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, adapter: dict[str, Tensor]) -> None:
        """Copies leave the tensors where they are, and a graph over them, whose backward pass comes later, whole."""
        for name, parameter in self.policy.trainable().items():
            parameter.data.copy_(adapter[name])
        torch.clear_autocast_cache()  # of the adapter that was there

    def state_dict(self) -> dict[str, Any]:
        """That of `Trainer`, and the old policy."""
        return super().state_dict() | {"old": self.old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        super().load_state_dict(state)
        for name, tensor in self.old.items():
            tensor.copy_(state["old"][name])
