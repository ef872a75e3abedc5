"""Learning a reward from choices between pairs of images, on frozen embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.preference.head import Likelihood, PreferenceHead

Head = TypeVar("Head", bound=nn.Module)
Choices = TypeVar("Choices", bound="Pairs")


@dataclass(frozen=True)
class Pairs:
    """N choices between two images of one prompt, as embeddings.

    Attributes:
        first, second: (N, D) unit embeddings of the images.
        text: (N, D) unit embeddings of the prompts.
        outcome: (N,) 1 the first was preferred, -1 the second, 0 a tie.
        prompts: N prompts, by which pairs are split: images of one prompt occur in several pairs.
    """

    first: Tensor
    second: Tensor
    text: Tensor
    outcome: Tensor
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = {len(part) for part in (self.first, self.second, self.text, self.outcome, self.prompts)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"pairs with {sorted(counts)} rows: every part has one row a pair, and there is a pair.")
        wrong = ~torch.isin(self.outcome, torch.tensor([-1, 0, 1], device=self.outcome.device))
        if wrong.any():
            raise ValueError(f"outcome {self.outcome[wrong][0]:g}: it is 1 (first preferred), -1 (second) or 0 (a tie)")

    def __len__(self) -> int:
        return len(self.outcome)

    def take(self, rows: Tensor) -> Self:
        """The pairs of these indices (M,); an index may occur often, as in a bootstrap."""
        index = rows.tolist()
        parts = {
            name: part[rows] if isinstance(part, Tensor) else tuple(part[i] for i in index)
            for name, part in vars(self).items()
        }
        return replace(self, **parts)

    def split(self, share: float, seed: int) -> tuple[Self, Self]:
        """(the rest, about `share` of the prompts with all their pairs).

        Raises:
            ValueError: there is only one prompt.
        """
        names = sorted(set(self.prompts))
        if len(names) < 2:
            raise ValueError("pairs of one prompt cannot be split into training and validation: give more prompts.")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        held = {names[i] for i in order[: min(max(1, round(share * len(names))), len(names) - 1)]}
        inside = torch.tensor([prompt in held for prompt in self.prompts])
        return self.take((~inside).nonzero().flatten()), self.take(inside.nonzero().flatten())


@torch.no_grad()
def encode_pairs(
    encoder: DualEncoder,
    first: Tensor,
    second: Tensor,
    prompts: Sequence[str],
    outcome: Sequence[int] | Tensor,
    batch_size: int = 64,
) -> Pairs:
    """Choices between images (N, 3, H, W) in [0, 1] as embeddings of `encoder`, on the host."""

    def features(images: Tensor) -> Tensor:
        return torch.cat([encoder.image_features(part).cpu() for part in images.split(batch_size)])

    text = encoder.text_features(list(prompts)).cpu()
    return Pairs(features(first), features(second), text, torch.as_tensor(outcome), tuple(prompts))


@dataclass(frozen=True)
class Fitted(Generic[Head]):
    """A trained head, and what it reached.

    Attributes:
        head: in evaluation mode, on the host.
        epoch: after which its weights were taken; the last was `patience` later, or `epochs`.
        validation: figures on pairs that it did not learn from.
        training: on those that it did.
    """

    head: Head
    epoch: int
    validation: dict[str, float]
    training: dict[str, float]


def fit_preference(
    pairs: Pairs,
    validation: Pairs | None = None,
    *,
    likelihood: Likelihood = "bradley-terry",
    hidden: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    **how: Any,
) -> Fitted[PreferenceHead]:
    """The head that makes the choices most probable: maximum likelihood by AdamW, stopped on validation.

    The same pairs and seed give the same head on one machine. A head with ties forgets them: its reward is r alone.

    Args:
        pairs: to learn from.
        validation: to stop on; default: a fifth of the prompts of `pairs`, which then are not learned from.
        likelihood: "bradley-terry" for decided pairs, "rao-kupper" where some are ties, "gaussian" for a head that
            says how sure it is (decided pairs).
        hidden: width of its hidden layer; 0: a linear head.
        learning_rate: of AdamW.
        seed: of the first weights, the order and the split.
        **how: weight_decay, batch_size, epochs and patience, as for `descend`.

    Raises:
        ValueError: ties for a likelihood that has none.
    """
    if validation is None:
        pairs, validation = pairs.split(0.2, seed)
    ties = int((pairs.outcome == 0).sum() + (validation.outcome == 0).sum())
    if ties and likelihood != "rao-kupper":
        raise ValueError(f"{ties} of the pairs are ties, and {likelihood} knows none: take rao-kupper, or drop them.")
    head = PreferenceHead(pairs.first.shape[1], hidden, likelihood, seed=seed)
    return descend(head, pairs, validation, _loss, measure, learning_rate=learning_rate, seed=seed, **how)


def descend(
    head: Head,
    pairs: Choices,
    validation: Choices,
    loss: Callable[[Head, Choices], Tensor],
    figures: Callable[[Head, Choices], dict[str, float]],
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    epochs: int = 200,
    patience: int = 20,
    seed: int = 0,
) -> Fitted[Head]:
    """Minimises a loss of pairs by AdamW, stops on validation, and leaves the weights of the best epoch in the head.

    Args:
        head: whose parameters are learned.
        pairs: to learn from.
        validation: to stop on.
        loss: mean over pairs.
        figures: of the trained head on pairs.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: pairs a step.
        epochs: at most.
        patience: epochs without a lower validation loss after which it stops.
        seed: of the order of the pairs.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    best, best_epoch, best_state = float("inf"), 0, copy.deepcopy(head.state_dict())
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(pairs), generator=order).split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss(head, pairs.take(rows)).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(loss(head, validation))
        if found < best:
            best, best_epoch, best_state = found, epoch, copy.deepcopy(head.state_dict())
        elif epoch - best_epoch >= patience:
            break
    head.load_state_dict(best_state)
    head.eval().requires_grad_(False)
    return Fitted(head, best_epoch, figures(head, validation), figures(head, pairs))


def _loss(head: PreferenceHead, pairs: Pairs) -> Tensor:
    return -head.log_probability(pairs.first, pairs.second, pairs.text, pairs.outcome).mean()


@torch.no_grad()
def measure(head: PreferenceHead, pairs: Pairs, bins: int = 10) -> dict[str, float]:
    """How well a head foretells choices.

    ``nll``: nats a pair, ties included. The rest is of the decided pairs: ``accuracy``, the share whose preferred image
    has the higher reward (equal rewards are half right); ``confidence``, the mean probability of its own favourite,
    given that there is no tie; ``calibration_error``, the mean distance of the two over bins of confidence of equal
    width in [1/2, 1], weighed by their pairs (Guo et al. 2017, arXiv:1706.04599, equation 3). NaN without such pairs.
    """
    figures = {"pairs": len(pairs), "ties": int((pairs.outcome == 0).sum()), "nll": float(_loss(head, pairs))}
    nan = float("nan")
    if figures["ties"] == len(pairs):
        return figures | {"accuracy": nan, "confidence": nan, "calibration_error": nan}
    decided = pairs.take((pairs.outcome != 0).nonzero().flatten())
    one = torch.ones_like(decided.outcome)
    first, second = (head.log_probability(decided.first, decided.second, decided.text, s) for s in (one, -one))
    chance = torch.sigmoid(first - second)
    right = torch.where(chance == 0.5, 0.5, ((chance > 0.5) == (decided.outcome > 0)).float())
    confidence = chance.maximum(1 - chance)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, bin_of, right - confidence).abs().sum() / len(decided)
    mean = {"accuracy": right.mean(), "confidence": confidence.mean(), "calibration_error": gap}
    return figures | {name: float(value) for name, value in mean.items()}
