"""The mixture of experts of MJ-VIDEO: 28 criteria, weighed into five aspects, weighed into one score."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffalign.rewards.weights import filled

ASPECTS = ("alignment", "safety", "fineness", "coherence", "fairness")
CRITERIA = (5, 6, 5, 7, 5)
"""Of each aspect, in the order of the outputs."""


class Gate(nn.Module):
    """Linear layers with ReLU between, (D) -> (outputs), and the scale of the weights that are made of them."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Linear(ins, outs) for ins, outs in pairwise(sizes))

    def forward(self, state: Tensor) -> Tensor:
        """Logits (B, outputs)."""
        for layer in self.layers[:-1]:
            state = layer(state).relu()
        return self.layers[-1](state)


class MixtureHead(nn.Module):
    """Under the published names. `gates`: sizes of the layers of a gate but the last."""

    def __init__(self, gates: tuple[int, ...]) -> None:
        super().__init__()
        self.regression_layer = nn.Linear(gates[0], sum(CRITERIA), bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(sum(CRITERIA)))
        self.aspect_gating = Gate((*gates, len(ASPECTS)))
        self.criteria_gating = Gate((*gates, sum(CRITERIA)))

    def forward(self, question: Tensor, last: Tensor) -> Tensor:
        """(B, 6): the five aspects and the whole, of two hidden states (B, D)."""
        experts = (self.regression_layer(last) @ self.reward_transform_matrix).split(CRITERIA, dim=1)
        gates = self.criteria_gating(question).split(CRITERIA, dim=1)
        scores = [(expert * gate.softmax(dim=1)).sum(dim=1) for expert, gate in zip(experts, gates, strict=True)]
        aspects = self.criteria_gating.logit_scale * torch.stack(scores, dim=1)
        weights = self.aspect_gating.logit_scale * self.aspect_gating(question).softmax(dim=1)
        return torch.cat([aspects, (weights * aspects).sum(dim=1, keepdim=True)], dim=1)


def load_head(weights: dict[str, Tensor], width: int, place: str) -> MixtureHead:
    """A frozen head in float32 of hidden states of so many numbers. ValueError where the weights are of another."""
    hidden, number = [], 0
    while (layer := weights.get(f"aspect_gating.layers.{number}.weight")) is not None:
        hidden.append(len(layer))
        number += 1
    weights = {name: tensor.float() for name, tensor in weights.items()}
    return filled(MixtureHead, weights, place, gates=(width, *hidden[:-1]))
