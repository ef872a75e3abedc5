r"""DRAGON: of its own samples the policy is drawn towards a good set and away from a bad one.

The samples of a step are divided into a positive set D+ and a negative set D- of equal size, by any reward r:

- of images, and of images against exemplars: of each prompt the better half and the worse half, in pairs whose rewards
  differ;
- of sets, `credit: swap`: the first and the second half of each prompt's samples make two sets. The one of higher r is
  D+, the other D-; then place after place the two samples are exchanged if that raises r(D+);
- of sets, `credit: leave_one_out`: as for images, by what each does for the set of all samples: see `SetCredit`.

With e(x) the denoising error of the policy, e_ref(x) that of the reference (adapter off), both means over a latent's
elements, and the *implicit reward* h(x) = beta / 2 (e_ref(x_t) - e(x_t)), x_t = alpha_t x_0 + sigma_t noise,

    dpo:  - E log sigmoid(h(x+) - h(x-)),           x+ and x- of one prompt, with one level and one noise
    kto:  E_{D+} [1 - sigmoid(h(x) - z)] / 2 + E_{D-} [1 - sigmoid(z - h(x))] / 2,      z = sg(max(0, E h))

with z over the samples of the update, of all processes. DPO starts at ln 2, KTO at 1/2, and z there is 0.

Sources: Bai et al. 2025, "DRAGON: distributional rewards optimize diffusion generative models" (arXiv 2504.15217), for
the sets; Wallace et al. 2024 (arXiv 2311.12908) and Li et al. 2024 (Diffusion-KTO, arXiv 2404.04465) for the losses.
There is no public code of DRAGON, and of the paper its abstract, its figures and summaries of its algorithm were at
hand: its order of swaps, its beta, its learning rate and its unpaired form are not known here.

Departures and choices:

- Diffusion-KTO's code has beta where h has beta / 2, as h is that of DPO in this package; and takes z over one
  micro-batch of each process. z over the whole update costs two more evaluations of each sample.
- More than two samples of a prompt are used, if their number is even; the paper draws two.
- Unpaired, the two sets are the better and the worse half of the whole step, whatever the prompts.
- The paper trains all weights, this an adapter.
- A failed score leaves both sets, as does the sample that it would be a pair with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.data import Prompt
from diffalign.finetune.dragon_config import DragonConfig
from diffalign.finetune.forward import errors_beside_reference
from diffalign.finetune.forward_trainer import Draw, ForwardTrainer
from diffalign.finetune.online import Part
from diffalign.finetune.trainer import TRAINERS
from diffalign.ledger import Ledger
from diffalign.policies import Policy
from diffalign.rewards import Reward, SetCredit, SetReward


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(h(x+) - h(x-)), (K,) of implicit rewards (K,)."""
    return softplus(rejected - chosen)


def kto_loss(implicit: Tensor, labels: Tensor, reference_point: float | Tensor) -> Tensor:
    """1 - sigmoid(h - z) where the label is 1, 1 - sigmoid(z - h) where it is -1; (B,) of implicit rewards (B,)."""
    return torch.sigmoid(labels * (reference_point - implicit))


def halves(rewards: Tensor) -> Tensor:
    """Which samples of a group are a pair: rewards (P, G), NaN where a score failed, to labels j, -j or 0.

    The j-th best of the better half, counted from 1, has label j, and the j-th best of the worse half -j. Where the two
    rewards are equal both have 0, as has the one in the middle of an odd number.
    """
    labels = torch.zeros_like(rewards)
    for row, found in zip(rewards, labels, strict=True):
        order = row.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[: int((~row.isnan()).sum())]
        half = len(order) // 2
        good, bad = order[:half], order[len(order) - half :]
        ranks = torch.arange(1, half + 1) * (row[good] > row[bad])
        found[good], found[bad] = ranks.to(found), -ranks.to(found)
    return labels


def swapped(reward: SetReward, features: Tensor) -> tuple[Tensor, dict[str, float]]:
    """D+ and D- of a reward of sets, by greedy swaps between the two halves of each group.

    Args:
        reward: of sets.
        features: (P, G, D) float64, NaN where a sample failed; its place is left out.

    Returns:
        (Labels (P, G) as of `halves`, j of a prompt's j-th place; the values of the two sets). Without enough samples
        for a value no label.
    """
    prompts, group, width = features.shape
    first, second = features.reshape(prompts, 2, group // 2, width).transpose(0, 1).reshape(2, -1, width)
    whole = (first.isfinite() & second.isfinite()).all(1)
    first, second = first[whole], second[whole]
    labels = torch.zeros(2, len(whole), dtype=torch.float64)
    if len(first) < reward.smallest:
        return labels.reshape(prompts, group), {}
    mask, value = reward.better_set(first, second)
    places = torch.arange(1, group // 2 + 1).repeat(prompts)[whole]
    labels[:, whole] = torch.stack([mask, ~mask]).double().mul(2).sub(1) * places
    values = {"set_chosen": value, "set_rejected": float(reward.value(torch.where(mask[:, None], second, first)))}
    return labels.reshape(2, prompts, -1).transpose(0, 1).reshape(prompts, group), values


def pairs_of(labels: Tensor, group_size: int) -> Tensor:
    """Rows of good and bad samples, (B / 2, 2): those whose labels (B,) in a group are j and -j, and those of 0."""
    order = labels.reshape(-1, group_size).argsort(dim=1, descending=True, stable=True)
    order = order + torch.arange(0, len(labels), group_size)[:, None]
    return torch.stack([order[:, : group_size // 2], order.flip(1)[:, : group_size // 2]], dim=2).reshape(-1, 2)


@TRAINERS.register("dragon")
class Dragon(ForwardTrainer):
    """Trains the adapter by DRAGON; settings of `TrainingConfig` and `DragonConfig`.

    Raises ValueError at once for an odd group_size, and for a reward of sets among others where `credit` is swap.
    """

    config_class = DragonConfig
    config: DragonConfig

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        super().__init__(policy, reward, **settings)
        if self.config.paired and self.training.group_size % 2:
            raise ValueError(
                f"group_size = {self.training.group_size}: dragon divides a prompt's samples in two, use an even number"
            )
        if not self.reward.setwise or self.config.credit != "swap":
            return
        if not isinstance(self.reward, SetCredit):
            raise ValueError(
                f"credit = swap is for a reward of sets alone, and {self.reward.name!r} is made of several: "
                "use leave_one_out"
            )
        if not self.config.paired:
            raise ValueError("credit = swap exchanges samples of one prompt: with paired = false use leave_one_out")

    @property
    def _swaps(self) -> bool:
        return self.reward.setwise and self.config.credit == "swap"

    @property
    def compares(self) -> bool:
        """Not where the whole step is the measure."""
        return self.config.paired

    def weights(self, rewards: Tensor) -> Tensor:
        """Labels (P, G) of all processes' samples by their rewards; see `halves`."""
        return halves(rewards) if self.config.paired else halves(rewards.reshape(1, -1)).reshape(rewards.shape)

    def weigh(self, parts: list[Part], prompts: Sequence[Prompt]) -> None:
        """Divide the step's samples, and count those of each update over all processes."""
        if not self._swaps:
            labels_of_all = self.weights(self.rewards_of(parts))
        else:
            features = [part.features[self.reward.name] for part in parts]
            width = max(each.shape[1] for each in features)  # 1 where every sample of a part failed: NaN
            every = self.gathered(torch.cat([each.expand(-1, width) for each in features]))
            labels_of_all, values = swapped(self.reward.of_set, every)  # type: ignore[attr-defined]
            for part in parts:
                part.sums |= {name: torch.tensor(value * len(part)) for name, value in values.items()}
        found = self.own(labels_of_all, parts)
        counts = torch.tensor([int(labels.count_nonzero()) for labels in found], device=self.policy.device)
        counts = self.accelerator.reduce(counts, reduction="sum").tolist()
        for part, labels, count in zip(parts, found, counts, strict=True):
            # Unpaired, a minibatch may have more of one set: each sample counts the same all the same.
            part.advantages, part.pairs = labels, count / 2

    def minimise(self, part: Part) -> tuple[dict[str, Tensor], Ledger]:
        """One evaluation with gradient for each sample of the two sets and draw, and one of the reference."""
        kto = self.config.contrast == "kto"
        point = self.reference_point(part) if kto else None
        count = (part.pairs or 1) * self.config.timesteps_per_sample
        zero, ledger = torch.zeros((), device=self.policy.device), Ledger()
        sums = dict.fromkeys(("loss", "implicit_chosen", "implicit_rejected", "prediction_mse"), zero)
        for draw in self.draws(part):
            implicit, distance = self.implicit(draw)
            counted = draw.weight.abs().to(implicit)
            if point is None:
                chosen, rejected = implicit.chunk(2)
                loss = (dpo_loss(chosen, rejected) * counted[: len(chosen)]).sum()
            else:
                loss = (kto_loss(implicit, draw.weight, point) * counted).sum() / 2
            away = (distance * counted).sum() / 2
            ((loss + self.config.kl_weight * away) / count).backward()
            of_sets = ((implicit * (draw.weight == label)).sum() for label in (1, -1))
            for name, value in zip(sums, (loss, *of_sets, away), strict=True):
                sums[name] = sums[name] + value.detach() * self.images / count
            ledger.add(Ledger(denoiser_evaluations=(4 if kto else 2) * len(counted), backward_passes=len(counted)))
        return sums | {"trained": self._labels(part).ne(0).sum()}, ledger

    def reference_point(self, part: Part) -> Tensor:
        """KTO's z of an update: the mean implicit reward of its samples, of all processes, or 0 if that is below."""
        total = torch.zeros((), device=self.policy.device)
        with torch.no_grad():
            for draw in self.draws(part):
                total = total + (self.implicit(draw)[0] * draw.weight.abs()).sum()
        total = self.accelerator.reduce(total, reduction="sum")
        return (total / (2 * (part.pairs or 1) * self.config.timesteps_per_sample)).clamp(min=0)

    def implicit(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """(h (B,) with its graph, the mean square of the difference of the two predictions (B,))."""
        error, before, distance = errors_beside_reference(
            self.policy, lambda: self.predict(draw), draw.latents, draw.noise
        )
        return self.config.beta / 2 * (before - error), distance

    def draws(self, part: Part) -> Iterator[Draw]:
        """All that one update evaluates, in micro-batches; paired, the good samples come first, then each one's pair.

        `weight` is 1 of a good sample, -1 of a bad one, 0 of one that is only evaluated.
        """
        labels = self._labels(part)
        signs = labels.sign()
        rows = pairs_of(labels, self.training.group_size) if self.config.paired else torch.arange(len(part))[:, None]
        if not self.policy.blocks_are_sharded:
            rows = rows[signs[rows[:, 0]] != 0]
        items = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(self.config.timesteps_per_sample))
        for chunk in items.split(max(1, self.rows_at_once(len(part)) // rows.shape[1])):
            if len(chunk):
                yield self._together(part, rows[chunk[:, 0]], chunk[:, 1], signs)

    def _together(self, part: Part, rows: Tensor, draws: Tensor, signs: Tensor) -> Draw:
        """Rows (N, 1 or 2) of a part, each at one level and with one noise, column after column."""
        columns = rows.shape[1]
        drawn = self.draw(part, rows.T.flatten(), draws.repeat(columns), signs)
        first = torch.arange(len(rows), device=drawn.noise.device).repeat(columns)
        return replace(drawn, noise=drawn.noise[first], level=drawn.level.rows(first))

    def _labels(self, part: Part) -> Tensor:
        assert part.advantages is not None
        return part.advantages

    def probe(self, prompts: Sequence[Prompt]) -> int:
        """Samples, scores, and the gradient of one draw of all of them."""
        part, _ = self.collect(prompts)
        rows = torch.arange(len(part))
        draw = self.draw(part, rows, torch.zeros_like(rows), torch.ones(len(part), dtype=torch.float64))
        self.implicit(draw)[0].sum().backward()
        return part.bytes_per_image
