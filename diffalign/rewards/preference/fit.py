"""Learning a reward from choices between pairs of images, on frozen embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.preference.head import Likelihood, PreferenceHead


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

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of these indices (M,); an index may occur often, as in a bootstrap."""
        parts = (self.first[rows], self.second[rows], self.text[rows], self.outcome[rows])
        return Pairs(*parts, tuple(self.prompts[i] for i in rows.tolist()))

    def split(self, share: float, seed: int) -> tuple[Pairs, Pairs]:
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
class Fitted:
    """A trained head, and what it reached.

    Attributes:
        head: in evaluation mode, on the host.
        epoch: after which its weights were taken; the last was `patience` later, or `epochs`.
        validation: figures of `measure` on pairs that it did not learn from.
        training: on those that it did.
    """

    head: PreferenceHead
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
    weight_decay: float = 0.01,
    batch_size: int = 64,
    epochs: int = 200,
    patience: int = 20,
    seed: int = 0,
) -> Fitted:
    """The head that makes the choices most probable: maximum likelihood by AdamW, stopped on validation.

    The same pairs and seed give the same head on one machine. A head with ties forgets them: its reward is r alone.

    Args:
        pairs: to learn from.
        validation: to stop on; default: a fifth of the prompts of `pairs`, which then are not learned from.
        likelihood: "bradley-terry" for decided pairs, "rao-kupper" where some are ties, "gaussian" for a head that
            says how sure it is (decided pairs).
        hidden: width of its hidden layer; 0: a linear head.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: pairs a step.
        epochs: at most.
        patience: epochs without a better validation likelihood after which it stops.
        seed: of the first weights, the order and the split.

    Raises:
        ValueError: ties for a likelihood that has none.
    """
    if validation is None:
        pairs, validation = pairs.split(0.2, seed)
    ties = int((pairs.outcome == 0).sum() + (validation.outcome == 0).sum())
    if ties and likelihood != "rao-kupper":
        raise ValueError(f"{ties} of the pairs are ties, and {likelihood} knows none: take rao-kupper, or drop them.")
    head = PreferenceHead(pairs.first.shape[1], hidden, likelihood, seed=seed)
    best_epoch = descend(
        head,
        lambda rows: _loss(head, pairs, rows),
        len(pairs),
        lambda: _loss(head, validation),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        seed=seed,
    )
    head.eval().requires_grad_(False)
    return Fitted(head, best_epoch, measure(head, validation), measure(head, pairs))


def descend(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    held_out: Callable[[], Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    epochs: int,
    patience: int,
    seed: int,
) -> int:
    """Minimises a loss by AdamW, stops on held-out data, and leaves the weights of the best epoch in the model.

    Args:
        model: whose parameters are learned.
        loss: mean over the rows of these indices (M,).
        count: of the rows.
        held_out: loss on data that are not learned from.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: rows a step.
        epochs: at most.
        patience: epochs without a lower held-out loss after which it stops.
        seed: of the order of the rows.

    Returns:
        The best epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    best, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(count, generator=order).split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss(rows).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(held_out())
        if found < best:
            best, best_epoch, best_state = found, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(best_state)
    return best_epoch


def _loss(head: PreferenceHead, pairs: Pairs, rows: Tensor | slice = slice(None)) -> Tensor:
    return -head.log_probability(pairs.first[rows], pairs.second[rows], pairs.text[rows], pairs.outcome[rows]).mean()


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
