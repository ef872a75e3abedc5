"""Learning a mixture of tastes from choices whose users are known, and a new user's from a few choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.pal.model import PalModel, Variant
from diffalign.rewards.preference import Fitted, Pairs, bradley_terry
from diffalign.rewards.preference.fit import descend


@dataclass(frozen=True)
class UserPairs(Pairs):
    """Choices between two images of one prompt, and who made them; none is a tie.

    Attributes:
        users: N names.
    """

    users: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.users) != len(self.outcome):
            raise ValueError(f"{len(self.users)} users for {len(self.outcome)} pairs: each pair has one.")
        ties = int((self.outcome == 0).sum())
        if ties:
            raise ValueError(f"{ties} of the pairs are ties, of which PAL knows nothing: leave them out.")

    @classmethod
    def of(cls, pairs: Pairs, users: tuple[str, ...]) -> UserPairs:
        """Pairs, such as those of `encode_pairs`, with their users."""
        return cls(pairs.first, pairs.second, pairs.text, pairs.outcome, pairs.prompts, tuple(users))


def fit_pal(
    pairs: UserPairs,
    validation: UserPairs | None = None,
    *,
    variant: Variant = "A",
    prototypes: int = 4,
    dimension: int = 32,
    hidden: int = 0,
    learning_rate: float = 1e-2,
    seed: int = 0,
    **how: Any,
) -> Fitted[PalModel]:
    """The prototypes, the map and the users' mixtures that make the choices most probable, as `fit_preference` does.

    The loss is the cross-entropy of the choices under Bradley and Terry's model, with each choice judged by its user's
    reward. The same pairs and seed give the same model on one machine.

    Args:
        pairs: to learn from.
        validation: to stop on, of the same users; default: a fifth of the prompts of `pairs`, which then are not
            learned from, less the pairs of users who occur nowhere else.
        variant: as for `PalModel`.
        prototypes: of them all.
        dimension: of the space that images are mapped into.
        hidden: width of the map's hidden layer; 0: a linear map.
        learning_rate: of AdamW.
        seed: of the first weights, the order and the split.
        **how: weight_decay, batch_size, epochs and patience, as for `descend`.

    Raises:
        ValueError: validation has a user who made no choice in `pairs`.
    """
    if validation is None:
        pairs, validation = pairs.split(0.2, seed)
        known = set(pairs.users)
        rows = [row for row, user in enumerate(validation.users) if user in known]
        validation = validation.take(torch.tensor(rows, dtype=torch.long))
    users = sorted(set(pairs.users))
    shape = {"prototypes": prototypes, "dimension": dimension, "hidden": hidden}
    model = PalModel(pairs.first.shape[1], users, variant=variant, seed=seed, **shape)
    model.mixtures(validation.users)  # names a user who is not known before any training
    return descend(model, pairs, validation, _loss, measure_pal, learning_rate=learning_rate, seed=seed, **how)


def _margin(model: PalModel, pairs: Pairs, mixture: Tensor) -> Tensor:
    return model(pairs.first, pairs.text, mixture) - model(pairs.second, pairs.text, mixture)


def _loss(model: PalModel, pairs: UserPairs) -> Tensor:
    return -bradley_terry(_margin(model, pairs, model.mixtures(pairs.users)), pairs.outcome).mean()


@torch.no_grad()
def measure_pal(model: PalModel, pairs: UserPairs, mixture: Tensor | None = None) -> dict[str, float]:
    """How well a model foretells choices: ``nll`` in nats a pair, and ``accuracy``, where equal rewards are half right.

    Args:
        model: of the pairs' users.
        pairs: to foretell.
        mixture: (K,) of all of them in the place of their own, such as ``model.population``.
    """
    each = model.mixtures(pairs.users) if mixture is None else mixture.to(pairs.first).expand(len(pairs), -1)
    margin = _margin(model, pairs, each)
    nll = -bradley_terry(margin, pairs.outcome).mean()
    right = torch.where(margin == 0, 0.5, (margin * pairs.outcome > 0).float()).mean()
    return {"pairs": len(pairs), "nll": float(nll), "accuracy": float(right)}


def fit_user(model: PalModel, pairs: Pairs, *, prior: float = 1.0) -> Tensor:
    """The mixture (K,) of a new user from a few choices; everything else stays as it is. For `PalModel.with_user`.

    With m_nk the margin of choice n, which is s_n = 1 or -1, by prototype k alone, the user's own margin is
    sum_k w_k m_nk, so that

        -sum_n log sigmoid(s_n sum_k w_k m_nk) - prior sum_k v_k log w_k

    is convex in w: its minimum is the only one, whatever the start. v is the population's mean mixture, and the second
    term the prior Dirichlet(1 + prior v): without any choice w is v. The authors' code has no such term, and descends
    from random logits.

    Args:
        model: trained on other users.
        pairs: the user's choices, none of them a tie; `UserPairs` will do, and their names are not read.
        prior: its strength, in choices, above 0.

    Raises:
        ValueError: prior is not above 0, or a pair is a tie.
    """
    if not prior > 0:
        raise ValueError(f"prior is {prior}: it is above 0, or w could have no minimum.")
    if bool((pairs.outcome == 0).any()):
        raise ValueError("a pair is a tie, of which PAL knows nothing: leave it out.")
    with torch.no_grad():
        one_hot = torch.eye(model.logits.shape[1], device=model.logits.device, dtype=model.logits.dtype)
        columns = [_margin(model, pairs, row.expand(len(pairs), -1)) for row in one_hot]
        margins = torch.stack(columns, dim=1).double()
        mean = model.population.double()
    logits = mean.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_mixture = logits.log_softmax(dim=0)
        choices = bradley_terry(margins @ log_mixture.exp(), pairs.outcome).sum()
        loss = -choices - prior * (mean * log_mixture).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(dim=0)
