r"""ReNO: the first noise of a one-step generator, optimised for the reward.

With G the generator, eps its noise of n elements and r the reward,

    max over eps of  r(G(eps)) + gamma log p_chi(||eps||),        p_chi the chi law of n degrees,

by gradient ascent: SGD with Nesterov momentum 0.9, learning rate 5, gradient norm at most 0.1, 50 iterations. The best
image by r alone is kept.

Source: Eyring et al. 2024, "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization"
(arXiv 2406.04312), equation 7 and algorithm 1, defaults as in its code; its four rewards with their weights are the
recipe ``reno``, whose terms differ from the paper's losses by constants and the sign. Departures:

- gamma = 0.01 is that of 16,384 elements and is scaled for other sizes: see `gaussianity.chi_of_size`.
- Latents and the norm are in fp32 whatever the generator computes in, and the gradient is clipped for each prompt, of
  which several share a batch. Prompts are encoded once, by the pipeline and by the rewards.
- Rewards see 8-bit pixels at their own sizes, where the paper shows all four the same 224 pixels in float.
- The noise that steps inject, where any is random, is frozen by its address in place of a generator that is seeded anew
  at every iteration. Any number of steps will do; through many, gradients are known to explode.
- The number of iterations is what the budget pays for.

The learning rate is a length: a clipped step moves eps by up to 0.5, and by 5 when momentum has gathered, of a norm of
sqrt(n) = 128 at 16,384 elements. The paper's code takes 10 for a generator of twice that norm.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import SGD

from diffalign.search.ascent import NoiseAscent
from diffalign.search.base import SEARCHES
from diffalign.search.config import ReNOConfig


@SEARCHES.register("reno")
class ReNO(NoiseAscent):
    """Optimises the first noise."""

    config_class = ReNOConfig

    def moved(self, noises: Tensor) -> int:
        """The first state's alone."""
        return 1

    def optimizer(self, noises: Tensor) -> SGD:
        """SGD with Nesterov momentum."""
        return SGD([noises], lr=self.config.learning_rate, momentum=0.9, nesterov=True)
