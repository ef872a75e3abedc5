"""Masked (absorbing) discrete diffusion: one step of a chain over tokens, and its categorical distributions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.laws.normal import Reduction, reduce_elements
from diffalign.laws.prediction import at_least_fp32
from diffalign.laws.schedule import Level


@dataclass(eq=False)
class Categorical:
    """Independent categorical distributions of the L tokens of each row.

    Reductions are over tokens: "sum" is in nats, "mean" is that divided by L. Where a loop trains on the steps of a
    chain, it stands in the place of a `Normal`: `validate` is there for that, and asks nothing of probabilities.

    Attributes:
        log_probs: (B, L, V) normalised log-probabilities in fp32 or float64; -inf is impossible.
    """

    log_probs: Tensor

    @classmethod
    def cat(cls, parts: Sequence["Categorical"]) -> "Categorical":
        """Put the rows of all parts in one batch."""
        return cls(torch.cat([part.log_probs for part in parts]))

    def rows(self, index: slice | Tensor) -> "Categorical":
        """Select rows."""
        return type(self)(self.log_probs[index])

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw tokens by the inverse of the distribution function, (B, L) int64.

        In float64: sums and Gumbel noise in fp32 cut the tail off, which lowers the temperature (Zheng et al. 2024,
        arXiv 2409.02908).

        Args:
            uniform: (B, L) in [0, 1).
        """
        cumulative = self.log_probs.double().exp().cumsum(-1)
        # Scaled by the last value, so that rounding leaves no gap below 1 that belongs to no token.
        target = uniform.double()[..., None] * cumulative[..., -1:]
        return (cumulative <= target).sum(-1)

    def log_prob(self, tokens: Tensor, reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return the log-probability of tokens (B, L), of shape (B,); -inf where one of them is impossible."""
        return reduce_elements(self._of(tokens), reduction)

    def log_ratio(self, tokens: Tensor, other: "Categorical", reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return log self(tokens) - log other(tokens), (B,), subtracted token by token before it is reduced.

        Args:
            tokens: (B, L), possible under ``other``, as what was sampled from it is.
            other: of the same shape.
            reduction: over tokens.
            validate: see the class.
        """
        return reduce_elements(self._of(tokens) - other._of(tokens), reduction)

    def kl(self, other: "Categorical", reduction: Reduction, *, validate: bool = True) -> Tensor:
        """Return KL(self || other), (B,), in closed form; inf where ``self`` can do what ``other`` cannot."""
        possible = self.log_probs > -torch.inf
        # Impossible tokens are taken out before the product as well as after it, or its gradient there, 0 inf, is NaN.
        own = torch.where(possible, self.log_probs, 0)
        return reduce_elements(torch.where(possible, own.exp() * (own - other.log_probs), 0).sum(-1), reduction)

    def _of(self, tokens: Tensor) -> Tensor:
        return self.log_probs.gather(-1, tokens[..., None]).squeeze(-1)


class MaskedDiffusion:
    r"""The reverse step of masked diffusion: MDLM (Sahoo et al. 2024, arXiv 2406.07524), equation 7.

    .. math::
        p(x_s \mid x_t = m) = \frac{\sigma_s}{\sigma_t}\, [x_s = m]
            + \frac{\sigma_t - \sigma_s}{\sigma_t}\, \hat p(x_0 = x_s \mid x_t), \qquad
        p(x_s \mid x_t \ne m) = [x_s = x_t]

    A level's sigma is the probability that a token is masked, and alpha = 1 - sigma the paper's alpha, so the tables of
    ``flow_schedule`` serve. As in the paper (SUBS) the mask is never predicted and what is unmasked stays.

    Tokens are independent given the state, so the marginals of the forward process are kept up to an error of order
    1/N in N steps, which comes from tokens that are revealed together. It is memoryless: the first state, all masks, is
    the same for every sample. Orders by confidence (MaskGIT) and remasking are other laws.

    Args:
        mask_id: the mask's token.
    """

    marginal_preserving = True
    memoryless = True

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id

    def __repr__(self) -> str:
        return f"MaskedDiffusion(mask_id={self.mask_id})"

    def step(self, logits: Tensor, x: Tensor, level: Level, to: Level) -> Categorical:
        """Return the distribution of the tokens at level ``to``.

        Args:
            logits: (B, L, V) of x_0, in any floating type, with a column for the mask that is not read.
            x: (B, L) int64 tokens.
            level: where the rows stand, (B,).
            to: where they go, (B,).

        Raises:
            ValueError: the logits have no column for the mask.
        """
        if not 0 <= self.mask_id < logits.shape[-1]:
            raise ValueError(
                f"mask_id = {self.mask_id} has no column in logits over {logits.shape[-1]} tokens: "
                "append columns up to the mask's"
            )
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_id
        clean = at_least_fp32(logits).masked_fill(is_mask, -torch.inf).log_softmax(-1)
        stay = (to.sigma / level.sigma).to(clean.dtype).reshape(-1, 1, 1)
        revealed = torch.where(is_mask, stay.log(), clean + torch.log1p(-stay))
        kept = torch.where(torch.arange(logits.shape[-1], device=x.device) == x[..., None], 0.0, -torch.inf)
        masked = (x == self.mask_id)[..., None]
        return Categorical(torch.where(masked, revealed, kept.to(clean.dtype)))
