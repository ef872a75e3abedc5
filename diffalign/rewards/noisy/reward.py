r"""Rewards of noisy latents: r(x_t, t, c), from the first blocks of the policy's own denoiser.

Noisy reward guidance (NRG; Flow-NRG for flows: Liu et al. 2025, "Improving Video Generation with Human Feedback", arXiv
2501.13918, section 4.4) moves a sampler along the gradient of a reward at the noisy state. A reward that was learned
on clean samples says little there, so this one is told the noise level and learns from noised samples. It reads
latents, needs no decoder, and its gradient goes through a few blocks only.

Of the paper's model is known that it takes the first layers of the video transformer, has one output an objective, and
learns all its weights by Bradley-Terry on pairs with the same noise and time; code, depth and pooling were not
published. Departures, and what stands in for the unknown:

- The blocks are frozen and shared with the policy; a head is all that is learned and stored. PRFL (Mi et al. 2025,
  arXiv 2511.21541) reads the first eight blocks of a frozen video transformer likewise, by a learned query.
- Pooling by four learned queries, and the time as a scale and a shift of the tokens, in the manner of DiNa-LRM (Liu et
  al. 2026, arXiv 2602.11146) without its attention layers.
- Each objective has a head of its own, so that one can be added or left out.
- Ties count, with a threshold that is learned for each objective (`diffalign.rewards.preference.rao_kupper`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.laws import Level
from diffalign.policies import Condition, Policy
from diffalign.rewards.noisy.head import NoisyHead
from diffalign.rewards.noisy.trunk import trunk_of

CONFIG, WEIGHTS = "config.json", "heads.safetensors"


class NoisyReward:
    """Scores of noisy latents, of several objectives, mixed by weights that are chosen when it is called.

    Scores are in nats: among samples of one prompt at one level with one noise, a difference d of an objective means
    preferred with odds exp(d) where there is no tie. Its adapter off, the policy's denoiser is what reads: training
    the policy does not change the reward.

    Args:
        policy: whose denoiser reads; the heads are on its device.
        objectives: name -> weight in the mix.
        blocks: of the denoiser, from the first.
        hidden: width of a head.
        seed: of the heads' first weights.

    Attributes:
        policy: as given.
        objectives: names, in the order of scores.
        weights: name -> weight that a call takes by default.
        heads: a `NoisyHead` for each objective.

    Raises:
        ValueError: no objective, the denoiser is of no class that is read, or has not this many blocks.
    """

    def __init__(
        self, policy: Policy, objectives: Mapping[str, float], *, blocks: int, hidden: int = 128, seed: int = 0
    ) -> None:
        if not objectives:
            raise ValueError("objectives is empty: name at least one")
        self.policy = policy
        self.objectives = tuple(objectives)
        self.weights = dict(objectives)
        self.trunk = trunk_of(policy, blocks)
        self.hidden = hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(NoisyHead(*self.trunk.widths, hidden) for _ in objectives)
        self.heads.to(policy.device, policy.state_dtype).requires_grad_(False)

    def scores(self, x: Tensor, level: Level, condition: Condition) -> Tensor:
        """Every objective's scores (B, K), with a gradient to the latents where those have one.

        Args:
            x: (B, C, h, w) noisy latents, the policy's states.
            level: (B,) where each row stands.
            condition: (B, ...) encoded prompts, from ``policy.encode``.
        """
        return self.judge(*self.trunk(x, level, condition))

    def judge(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Scores (B, K) of what the trunk read."""
        return torch.stack([head(tokens, time) for head in self._each()], dim=1)

    def log_probability(self, margins: Tensor, outcome: Tensor) -> Tensor:
        """Of outcomes (1, -1 or 0 for a tie), given differences of scores, each by its objective: all (..., K)."""
        found = [head.log_probability(margins[..., k], outcome[..., k]) for k, head in enumerate(self._each())]
        return torch.stack(found, dim=-1)

    def _each(self) -> Iterable[Any]:
        return self.heads

    def __call__(
        self, x: Tensor, level: Level, condition: Condition, weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """The weighted sum of the objectives (B,), arguments as in :meth:`scores`.

        Args:
            x: likewise.
            level: likewise.
            condition: likewise.
            weights: name -> weight; an objective that is not named has 0. Default: `weights` of the reward.

        Raises:
            ValueError: a weight for an objective that there is not.
        """
        return self.scores(x, level, condition) @ self.mix(weights).to(x.device, self.policy.state_dtype)

    def mix(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """Weights in the order of the objectives, (K,) in float64; ValueError for one that there is not."""
        chosen = self.weights if weights is None else weights
        unknown = sorted(set(chosen) - set(self.objectives))
        if unknown:
            raise ValueError(f"objective {unknown[0]!r} is unknown: this reward has {', '.join(self.objectives)}")
        return torch.tensor([chosen.get(name, 0.0) for name in self.objectives], dtype=torch.float64)

    def save(self, folder: str | Path) -> Path:
        """Writes the heads and what they stand on, not the denoiser's weights; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "objectives": self.weights,
            "denoiser": self.trunk.denoiser_class,
            "blocks": self.trunk.blocks,
            "widths": list(self.trunk.widths),
            "hidden": self.hidden,
        }
        save_file({name: t.float().cpu().contiguous() for name, t in self.heads.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, policy: Policy) -> Self:
        """Reads what `save` wrote, for the policy whose denoiser it was trained on.

        Class and widths of the denoiser are compared, its weights are not: those of another checkpoint of the same size
        give scores that mean nothing.

        Raises:
            FileNotFoundError: the folder holds no such reward.
            ValueError: it was made for another denoiser, or its files do not fit together.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no noise-aware reward: {CONFIG} is missing")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        try:
            reward = cls(policy, config["objectives"], blocks=config["blocks"], hidden=config["hidden"])
            made_for = config["denoiser"], *config["widths"]
            weights = load_file(folder / WEIGHTS)
        except KeyError as error:
            raise ValueError(f"{folder / CONFIG} has no key {error}: it is no noise-aware reward") from None
        here = reward.trunk.denoiser_class, *reward.trunk.widths
        if here != made_for:
            raise ValueError(f"{folder} was made for a denoiser {made_for}, and this policy's is {here}: load that one")
        try:
            reward.heads.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {error}") from error
        return reward
