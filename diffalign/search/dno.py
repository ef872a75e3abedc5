r"""DNO: every noise of a chain, the first and those that its steps inject, optimised for the reward.

With G the sampler and z_0, ..., z_K all the noise that it takes,

    max over z of  r(G(z_0, ..., z_K)) + gamma R(z),

by AdamW with learning rate 0.01 and gradient norm at most 1; R is the regulariser that `gaussianity.covariance` states,
of all noises as one row.

Source: Tang et al. 2024, "Inference-Time Alignment of Diffusion Models with Direct Noise Optimization" (arXiv
2405.18881), for differentiable rewards, defaults as in its code: gamma = 0, and 1 in its example of a reward that is
hacked. Departures:

- fp32 latents in place of gradients that are scaled for fp16, and the gradient is clipped for each prompt, of which
  several share a batch.
- Nothing is decoded on the way but the result; the paper's code decodes every state.
- The best result is kept, where the paper keeps the last.
- Its approximation for rewards without gradient is not here.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import AdamW

from diffalign.search.ascent import NoiseAscent
from diffalign.search.base import SEARCHES
from diffalign.search.config import DNOConfig


@SEARCHES.register("dno")
class DNO(NoiseAscent):
    """Optimises all noises."""

    config_class = DNOConfig

    def moved(self, noises: Tensor) -> int:
        """All."""
        return noises.shape[1]

    def optimizer(self, noises: Tensor) -> AdamW:
        """AdamW, which draws the noise a little to zero: by a ten-thousandth at each step."""
        return AdamW([noises], lr=self.config.learning_rate)
