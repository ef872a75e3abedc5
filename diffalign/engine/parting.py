"""The training reward and a held-out one parting: over-optimisation, told in words while a run can still be stopped.

A reward that is trained on long enough rises where what it stands for falls (Gao et al. 2023, arXiv 2210.10760). A
held-out reward that was learned from other data sees it; an oracle is never asked, for it never selects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.engine.checkpoint import defect
from diffalign.engine.evaluate import Evaluation
from diffalign.report import compare, is_oracle


@dataclass(frozen=True)
class Best:
    """The validation at which a held-out reward was best.

    Attributes:
        step: of training.
        proxy: mean of the training reward there.
        values: (N,) scores of the held-out reward there, image by image.
    """

    step: int
    proxy: float
    values: Tensor


class Parting:
    """Compares every validation with the one at which each held-out reward was best: same prompts, same noise."""

    def __init__(self) -> None:
        self.best: dict[str, Best] = {}

    def look(self, step: int, evaluation: Evaluation, proxy: str, checkpoints: Path) -> list[str]:
        """Takes in a validation; returns a sentence for each held-out reward that has parted from the training reward.

        It has parted where the training reward's mean is above that at the held-out reward's best, and the held-out
        reward is below its best by more than noise: the paired 95 % interval over prompts excludes 0.

        Args:
            step: of training.
            evaluation: the validation, scored; the same prompts each time.
            proxy: name of the training reward.
            checkpoints: folder of the run's checkpoints.
        """
        means = evaluation.means()
        ids = [prompt.id for prompt in evaluation.prompts]
        told = []
        for name, values in evaluation.scores.items():
            if name == proxy or is_oracle(name) or not values.isfinite().any():
                continue
            best = self.best.get(name)
            if best is None or means[name] > float(best.values.nanmean()):
                self.best[name] = Best(step, means[proxy], values)
                continue
            paired = compare(name, "heldout", best.values, values, ids)
            if means[proxy] > best.proxy and paired.high < 0:
                told.append(
                    f"step {step}: the training reward {proxy} has risen from {best.proxy:.4g} to {means[proxy]:.4g}, "
                    f"and the held-out reward {name} has fallen from its best, {paired.base:.4g} at step {best.step}, "
                    f"to {paired.tuned:.4g} (paired 95 % interval {paired.low:+.3g} to {paired.high:+.3g}): what is "
                    f"gained now is likely the training reward's own error. {_way_back(checkpoints, best.step)}"
                )
        return told

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to say the same."""
        return {name: {"step": b.step, "proxy": b.proxy, "values": b.values} for name, b in self.best.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.best = {name: Best(**best) for name, best in state.items()}


def _way_back(checkpoints: Path, step: int) -> str:
    checkpoint = checkpoints / f"step-{step:06d}"
    if defect(checkpoint, contents=False) is None:
        return f"The checkpoint of step {step} is {checkpoint}; stop earlier, or raise kl_weight"
    return f"There is no checkpoint of step {step}; stop earlier, or raise kl_weight"
