r"""Flow-GRPO: group-relative policy optimisation of a flow, whose ODE is run as an SDE of the same marginals.

The clipped ratio of `policy_gradient`, with advantages relative to the group of a prompt. Its forms:

- `window`: Flow-GRPO-Fast and MixGRPO. A few steps in a row draw noise and are trained, all others are the ODE's; where
  the window starts is drawn for each training step.
- `noise`: the SDE's coefficient of Flow-GRPO, or that of DanceGRPO, or the coefficients-preserving step of Flow-CPS.
- `ratio_norm`: GRPO-Guard. With S the step's spread and dmu = mu_theta - mu_old, the log-ratio (reduced by the mean)

      log rho = (2 dmu (x - mu_old) - dmu^2) / (2 S^2)    has mean -dmu^2 / (2 S^2) and a size of 1 / S, and
      log rho' = S (log rho + mean(dmu^2) / (2 S^2))      has mean 0 and one size for all steps.

  It weighs steps by S, and a divergence from the reference is not weighed so: the two together have no one beta.

Sources: Liu et al. 2025, Flow-GRPO (arXiv 2505.05470); Li et al. 2025, MixGRPO (arXiv 2507.21802); Xue et al. 2025,
DanceGRPO (arXiv 2505.07818); Wang & Yu 2025, Flow-CPS (arXiv 2509.05952); Wang et al. 2025, GRPO-Guard (arXiv
2510.22319). Departures:

- KL is that of the two Gaussians of a step, over 2 S^2, for all three kinds of noise. The authors' code leaves dt out
  of S^2: its beta at N steps is about N times our `kl_weight`.
- Groups are divided by their spread as it is, where the code adds 1e-4 to it, and the mean is over all samples, where
  the code leaves out those without advantage.
- Under `cps` the log-density is the whole Gaussian's; Flow-CPS leaves out 1 / (2 S^2), which weighs steps otherwise.
- By default all steps that draw noise are trained. The code leaves out the last one, whose noise is least; so does
  `min_std`, where that noise is small.
- The window is one for all prompts of a training step. GRPO-Guard's second part, which divides the gradient of a step
  by its dt, is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffalign.finetune.policy_gradient import PolicyGradient
from diffalign.finetune.trainer import TRAINERS
from diffalign.finetune.trajectory_config import FlowGRPOConfig
from diffalign.laws import CPS, DanceGRPONoise, FlowSDE, Law, Normal, Window
from diffalign.laws.normal import reduce_elements
from diffalign.noise import generator
from diffalign.policies import Policy
from diffalign.rewards import Reward


@TRAINERS.register("flow_grpo")
class FlowGRPO(PolicyGradient):
    """Trains the adapter by Flow-GRPO; settings of `TrainingConfig` and `FlowGRPOConfig`.

    Raises ValueError at once for groups of one, for noise of a flow on another pipeline, and where a window could be
    drawn that leaves no step to train on.
    """

    config_class = FlowGRPOConfig
    config: FlowGRPOConfig

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        stds, window = self._noise().stds(self.schedule), self.config.window
        for start in range(self._starts) if window else ():
            most = float(stds[start : start + window].max())
            if most == 0 or most < self.config.min_std:
                raise ValueError(
                    f"a window can start at step {start}, where {window} in a row draw a noise of {most:.3g} at most, "
                    f"and min_std = {self.config.min_std:g} leaves none to train on: lower it, or window_share"
                )

    def law(self) -> Law:
        """The SDE; with a window, in the steps where this training step's noise is."""
        if self.config.window is None:
            return self._noise()
        start = int(generator(self.training.seed, "window", self.step).integers(self._starts))
        return Window(self._noise(), self.schedule, start, start + self.config.window)

    @property
    def _starts(self) -> int:
        """At how many steps the window can start."""
        return max(1, round(self.config.window_share * len(self.schedule)) - (self.config.window or 0) + 1)

    def _noise(self) -> Law:
        """The SDE in all steps."""
        if self.schedule.kind != "flow" and self.config.noise != "flow_grpo":
            raise ValueError(f"noise = {self.config.noise} is that of a flow, and this pipeline is none: use flow_grpo")
        eta = self.config.eta
        if self.config.noise == "cps":
            return CPS() if eta is None else CPS(eta)
        if self.config.noise == "dance_grpo":
            return FlowSDE(DanceGRPONoise() if eta is None else DanceGRPONoise(eta))
        return super().law()

    def log_ratio(self, now: Normal, old: Normal, x: Tensor) -> Tensor:
        """Log rho (B,); under `ratio_norm` GRPO-Guard's."""
        plain = super().log_ratio(now, old, x)
        if not self.config.ratio_norm:
            return plain
        drift = reduce_elements((now.mean - old.mean).square(), self.config.reduction)
        return old.std * plain + drift / (2 * old.std)
