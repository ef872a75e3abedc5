"""A small network on a denoiser's tokens that says how good the image in them will be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu, softplus

from diffalign.rewards.preference import rao_kupper

QUERIES = 4


class NoisyHead(nn.Module):
    """One objective's reward in nats, of tokens (B, N, D) and the embedding (B, E) of their time.

    The tokens are normalised, scaled and shifted by a linear map of silu(embedding) that starts at the identity, and
    widened by one layer with GELU. Four learned queries each take a mean of them by softmax over the tokens, and a
    hidden layer turns the four means into a number. Weights are float32.

    Args:
        width: D.
        time_width: E.
        hidden: numbers of a widened token, and of the hidden layer.
    """

    def __init__(self, width: int, time_width: int, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(time_width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.token = nn.Linear(width, hidden)
        self.query = nn.Linear(hidden, QUERIES, bias=False)
        self.hidden = nn.Linear(QUERIES * hidden, hidden)
        self.output = nn.Linear(hidden, 1)
        self.tie = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Rewards (B,)."""
        scale, shift = self.modulation(silu(time))[:, None].chunk(2, dim=-1)
        tokens = layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
        tokens = gelu(self.token(tokens))
        means = self.query(tokens).softmax(dim=1).transpose(1, 2) @ tokens  # (B, QUERIES, hidden)
        return self.output(gelu(self.hidden(means.flatten(1))))[:, 0]

    def log_probability(self, margin: Tensor, outcome: Tensor) -> Tensor:
        """Of outcomes (1, -1 or 0 for a tie) given differences of rewards, both (M,): Bradley-Terry with ties."""
        return rao_kupper(margin, outcome, softplus(self.tie))
