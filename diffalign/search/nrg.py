r"""Noisy reward guidance: the score is shifted by the gradient of a reward that reads the noisy latents themselves.

With r_theta(x_t, t, y) = sum_k w_k r_k(x_t, t, y) the reward of noisy latents, mixed of several objectives, and w the
scale, the velocity of a flow becomes

    v~ = v - w t / (1 - t) grad_{x_t} r_theta(x_t, t, y),

after classifier-free guidance. This is a score larger by w grad r_theta, and so it is written here: with
x_t = alpha x_0 + sigma noise the predicted noise is shifted by -w sigma grad r_theta, on a flow and on a diffusion.
Where r_theta is the value log E[exp(r(x_0)) | x_t] and w = 1, the guided score is that of p(x_0) exp(r(x_0)) noised,
and every law that keeps the marginals samples that target, up to what N steps leave. A learned reward is no such value,
so results carry no weights; the best is kept.

Nothing goes back through the denoiser: a guided step costs its evaluation, and a forward and a backward pass of the
blocks that the noisy reward reads, counted as one reward call.

Source: Liu et al. 2025, "Improving video generation with human feedback" (Flow-NRG; arXiv 2501.13918), section 4.4.
Departures:

- At t = 1, where t / (1 - t) does not exist, the step is not guided: pure noise says nothing of the result.
- Diffusion pipelines are guided too.
- A row whose noisy score or its gradient is not finite goes unguided in that step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.laws import Normal
from diffalign.registry import locate
from diffalign.rewards import noisy
from diffalign.search.base import SEARCHES
from diffalign.search.config import NRGConfig
from diffalign.search.guidance import Guided, gradient_of, steps_with_signal, with_score
from diffalign.search.policy_space import PolicySpace
from diffalign.search.space import GaussianSpace, Path, Rows, Space


@SEARCHES.register("nrg")
class NRG(Guided):
    """Guides by a noise-aware reward on latents; what it finds is scored by the reward of the search.

    A subclass may take another noise-aware reward, of any Gaussian space, by `noisy_rewards`.

    Raises:
        FileNotFoundError, ValueError: when a search begins, the folder holds no noise-aware reward for this pipeline's
            denoiser, or a weight is of an objective that it has not.
    """

    config_class = NRGConfig
    config: NRGConfig
    _loaded: noisy.NoisyReward | None = None

    def check(self, space: Space) -> None:
        """Refuse what has no denoiser to read latents with, and load the noisy reward."""
        super().check(space)
        if not isinstance(space, PolicySpace):
            raise ValueError("nrg reads latents with the first blocks of a pipeline's denoiser: give it a policy")
        if self._loaded is None or self._loaded.policy is not space.policy:
            self._loaded = noisy.NoisyReward.load(locate(self.config.noisy_reward), space.policy)
        self._loaded.mix(self.config.weights)

    def guided(self, space: GaussianSpace) -> list[int]:
        """All steps but one from pure noise."""
        return steps_with_signal(space)

    def transition(self, space: GaussianSpace, rows: Rows, paths: Sequence[Path]) -> Normal:
        """The law's Gaussian of each row, of the shifted prediction."""
        output = space.predict(rows)
        gradients = [self._gradient(space, rows[part]) for part in space.micro_batches(len(rows))]
        shift = self.config.scale * torch.cat(gradients)
        return space.transition(rows, with_score(space, rows, output, shift))

    def _gradient(self, space: GaussianSpace, rows: Rows) -> Tensor:
        with torch.enable_grad():
            x = rows.x.detach().requires_grad_()
            values = self.noisy_rewards(space, Rows(x, rows.steps, rows.prompts))
        space.count_scores(values.detach(), rows.prompts)
        return gradient_of(values, x)

    def noisy_rewards(self, space: GaussianSpace, rows: Rows) -> Tensor:
        """Rewards (B,) of noisy states, differentiable by them; NaN where they failed."""
        assert isinstance(space, PolicySpace)
        assert self._loaded is not None
        level, condition = space.schedule.level(rows.steps, space.device), space.condition.rows(rows.prompts)
        return self._loaded(rows.x, level, condition, self.config.weights)
