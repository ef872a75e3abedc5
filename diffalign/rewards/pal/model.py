"""Users as mixtures of a few prototypes, and what each of them likes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.rewards.weights import read_weights

Variant = Literal["A", "B"]


class PalModel(nn.Module):
    """The reward of a user u for an image with the unit embedding x and a prompt with the unit embedding t, in nats.

    PAL, Chen et al. (2024), arXiv:2406.08469. u is a mixture w_u = softmax(logits) of K prototypes that all share.

    - Variant A: -||f(x) - a_u||^2 with the ideal point a_u = sum_k w_uk p_k. Prompts do not matter.
    - Variant B: <f(x), z_u> with the direction z_u = sum_k w_uk g_k(t), which depends on the prompt.

    f is linear without bias, or has one hidden layer with GELU; g_k are affine. Both read embeddings scaled by
    sqrt(D), so that their numbers are of size one. Whether the prototypes are permuted with the logits' columns makes
    no difference, and in both variants the difference of two rewards is linear in w_u.

    Departures from the authors' code (RamyaLab/pluralistic-alignment): it has the distance itself where A has its
    square, and the cosine times a learned scale where B has the inner product; its variant A embeds prompt and answer
    together by a language model, and has no images.

    Args:
        width: D, numbers of an embedding.
        users: their names, each once.
        variant: "A" or "B".
        prototypes: K.
        dimension: of the space that f maps into.
        hidden: width of the hidden layer of f; 0: none.
        seed: of the first weights.
    """

    def __init__(
        self,
        width: int,
        users: Sequence[str],
        *,
        variant: Variant = "A",
        prototypes: int = 4,
        dimension: int = 32,
        hidden: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if variant not in ("A", "B"):
            raise ValueError(f"variant is {variant!r}: use A (ideal points) or B (directions that the prompt turns).")
        if not users or len(set(users)) != len(users):
            raise ValueError(f"{len(users)} users with {len(set(users))} names: give at least one, each once.")
        self.width, self.variant, self.users = width, variant, tuple(users)
        self._rows = {user: row for row, user in enumerate(self.users)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(width, hidden) if hidden else None
            self.output = nn.Linear(hidden or width, dimension, bias=False)
            nn.init.normal_(self.output.weight, std=((hidden or width) * dimension) ** -0.5)  # |f(x)| is about one
            if variant == "A":
                self.points = nn.Parameter(torch.randn(prototypes, dimension) * dimension**-0.5)
            else:
                self.directions = nn.Linear(width, prototypes * dimension)
                nn.init.normal_(self.directions.weight, std=(width * dimension) ** -0.5)
            self.logits = nn.Parameter(torch.randn(len(users), prototypes))

    @property
    def population(self) -> Tensor:
        """The mean mixture (K,) of the users."""
        return self.logits.softmax(dim=1).mean(dim=0)

    def mixtures(self, users: Sequence[str]) -> Tensor:
        """The mixtures (B, K) of users; ValueError names one that is not known."""
        unknown = next((user for user in users if user not in self._rows), None)
        if unknown is not None:
            raise ValueError(f"user {unknown!r} is none of the {len(self.users)} known: add them by fit_user")
        return self.logits[[self._rows[user] for user in users]].softmax(dim=1)

    def forward(self, image: Tensor, text: Tensor | None, mixture: Tensor) -> Tensor:
        """Rewards (B,) of unit embeddings (B, D) and, in variant B, (B, D), for mixtures (B, K)."""
        x = image * self.width**0.5
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))
        x = self.output(x)
        if self.variant == "A":
            return -(x - mixture @ self.points).square().sum(dim=1)
        assert text is not None
        each = self.directions(text * self.width**0.5).reshape(len(x), mixture.shape[1], -1)
        return (x * torch.einsum("bk,bkd->bd", mixture, each)).sum(dim=1)

    def with_user(self, name: str, mixture: Tensor) -> Self:
        """A copy that knows a user by this mixture (K,), in the place of one with the same name."""
        model = copy.deepcopy(self)
        row = mixture.to(model.logits).log()[None]
        keep = [index for user, index in model._rows.items() if user != name]
        model.logits = nn.Parameter(torch.cat([model.logits.detach()[keep], row]), requires_grad=False)
        model.users = (*(self.users[index] for index in keep), name)
        model._rows = {user: index for index, user in enumerate(model.users)}
        return model

    def save(self, file: Path) -> None:
        """Writes weights and users as safetensors, from which `read` knows everything else."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, file, metadata={"users": json.dumps(self.users)})

    @classmethod
    def read(cls, file: Path) -> Self:
        """The model in a file that `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        weights = read_weights(file)
        try:
            with safe_open(file, "pt") as opened:
                users = json.loads(opened.metadata()["users"])
            variant: Variant = "A" if "points" in weights else "B"
            hidden = len(weights["hidden.bias"]) if "hidden.bias" in weights else 0
            width = (weights["hidden.weight"] if hidden else weights["output.weight"]).shape[1]
            shape = {"prototypes": weights["logits"].shape[1], "dimension": len(weights["output.weight"])}
            model = cls(width, users, variant=variant, hidden=hidden, **shape)
            model.load_state_dict(weights)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"{file} is no PAL model: it holds {', '.join(sorted(weights)[:4])}") from error
        return model.eval()
