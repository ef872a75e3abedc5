"""A small network on the embeddings of image and prompt, which says how good the image is and how sure it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, softplus

from diffalign.rewards.preference.likelihoods import bradley_terry, gaussian, rao_kupper
from diffalign.rewards.weights import read_weights

Likelihood = Literal["bradley-terry", "rao-kupper", "gaussian"]
_WIDEST = 3.0  # |log-variance|: s from 0.22 to 4.5 nats; less changes no choice, more leaves none to tell


class PreferenceHead(nn.Module):
    """Reward in nats, f([x, t, x * t]), of unit embeddings x of an image and t of its prompt.

    f is linear, or has one hidden layer with GELU. x, t and x * t are scaled by sqrt(D), sqrt(D) and D, so that their
    numbers are of size one; a linear f whose last third is equal everywhere is the cosine. Weights are float32.

    Args:
        width: D, numbers of an embedding.
        hidden: width of the hidden layer; 0: none.
        likelihood: of the choices that it learns from. "gaussian" adds an output, the log-variance, kept within
            (-3, 3) by 3 tanh(. / 3), and "rao-kupper" the threshold of ties.
        seed: of the first weights.
    """

    def __init__(self, width: int, hidden: int = 0, likelihood: Likelihood = "bradley-terry", *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(3 * width, hidden) if hidden else None
            self.output = nn.Linear(hidden or 3 * width, 2 if likelihood == "gaussian" else 1)
        if likelihood == "rao-kupper":
            self.tie = nn.Parameter(torch.zeros(()))
        self.width, self.likelihood = width, likelihood

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rewards (B,), log-variances (B,) or None) of unit embeddings (B, D) and (B, D)."""
        scale = self.width**0.5
        x = torch.cat([image * scale, text * scale, image * text * self.width], dim=-1)
        if self.hidden is not None:
            x = gelu(self.hidden(x))
        output = self.output(x)
        if self.likelihood != "gaussian":
            return output[:, 0], None
        return output[:, 0], _WIDEST * (output[:, 1] / _WIDEST).tanh()

    @property
    def threshold(self) -> Tensor:
        """The eta of `rao_kupper`, in nats."""
        return softplus(self.tie)

    def log_probability(self, first: Tensor, second: Tensor, text: Tensor, outcome: Tensor) -> Tensor:
        """Log-probability (B,) of the outcomes (B,) between images with the embeddings first and second (B, D)."""
        (mean_1, spread_1), (mean_2, spread_2) = self(first, text), self(second, text)
        margin = mean_1 - mean_2
        if spread_1 is not None and spread_2 is not None:
            return gaussian(margin, spread_1.exp() + spread_2.exp(), outcome)
        if self.likelihood == "rao-kupper":
            return rao_kupper(margin, outcome, self.threshold)
        return bradley_terry(margin, outcome)

    def save(self, file: Path) -> None:
        """Writes the weights as safetensors, from which `read` knows widths and likelihood."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, file)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The head in a file that `save` wrote.

        Raises:
            ValueError: the file holds another network.
        """
        weights = read_weights(file)
        try:
            hidden = len(weights["hidden.bias"]) if "hidden.bias" in weights else 0
            certain = len(weights["output.weight"]) == 1
            width = (weights["hidden.weight"] if hidden else weights["output.weight"]).shape[1] // 3
            pairwise: Likelihood = "rao-kupper" if "tie" in weights else "bradley-terry"
            head = cls(width, hidden, pairwise if certain else "gaussian")
            head.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file} is no preference head: it holds {', '.join(sorted(weights)[:4])}") from error
        return head.eval()
