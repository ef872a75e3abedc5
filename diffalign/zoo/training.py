"""One small training loop for every model of the zoo: moving average, schedule, log, checkpoint, exact resume."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim import Optimizer

from diffalign.engine.state import load_tree, save_tree


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, then linear decay to zero over the last `decay` of `steps`."""

    steps: int
    learning_rate: float
    warmup: int = 50
    decay: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of the step with this index, counted from 0."""
        left = (self.steps - step) / self.decay if self.decay else 1.0
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)


@dataclass(frozen=True)
class Restarts:
    """Schedules one after the other, each with a warm-up of its own: more training where the one before left off."""

    parts: tuple[Schedule, ...]

    @property
    def steps(self) -> int:
        """Of all."""
        return sum(part.steps for part in self.parts)

    @property
    def learning_rate(self) -> float:
        """The highest of all."""
        return max(part.learning_rate for part in self.parts)

    def rate(self, step: int) -> float:
        """Learning rate of the step with this index, counted from 0."""
        for part in self.parts:
            if step < part.steps:
                return part.rate(step)
            step -= part.steps
        raise IndexError(f"the schedule ends {step} steps earlier")


@dataclass(frozen=True)
class Batch:
    """What a loss may draw from: everything random is a function of (seed, step), so that a resumed run repeats it."""

    step: int
    rng: np.random.Generator
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> "Batch":
        """The batch of `step`."""
        return cls(step, np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 1_000_003 + step))


def train(
    model: nn.Module,
    loss: Callable[[Batch], dict[str, torch.Tensor]],
    schedule: Schedule | Restarts,
    folder: Path,
    *,
    seed: int,
    ema_decay: float = 0.998,
    weight_decay: float = 0.01,
    checkpoint_every: int = 100,
    log_every: int = 20,
    on_checkpoint: Callable[[int], None] | None = None,
) -> float:
    """Minimise `loss(batch)["loss"]` over the parameters of `model`; on return they hold the moving average.

    Resumes from `folder/checkpoint`, bit-equal to a run that was never stopped. Returns the seconds spent, over all
    resumes. `on_checkpoint(step)` is called with the moving average in place.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema = EMAModel(parameters, decay=ema_decay)
    start, seconds = _resume(folder, model, optimizer, ema)
    clock = time.monotonic()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        terms = loss(Batch.of(seed, step))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        done = step + 1
        if done % log_every == 0 or done == schedule.steps:
            spent = seconds + time.monotonic() - clock
            row = {name: round(float(term.detach()), 5) for name, term in terms.items()}
            _log(folder, {"step": done, **row, "grad_norm": round(float(norm), 4), "seconds": round(spent, 1)})
        if done % checkpoint_every == 0 or done == schedule.steps:
            spent = seconds + time.monotonic() - clock
            _save(folder, schedule, done, spent, model, optimizer, ema)
            if on_checkpoint is not None:
                ema.store(parameters)
                ema.copy_to(parameters)
                on_checkpoint(done)
                ema.restore(parameters)
    ema.copy_to(parameters)
    return seconds + time.monotonic() - clock


def _log(folder: Path, row: dict) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _save(
    folder: Path,
    schedule: Schedule | Restarts,
    step: int,
    seconds: float,
    model: nn.Module,
    optimizer: Optimizer,
    ema: EMAModel,
) -> None:
    tree = {
        "step": step,
        "seconds": seconds,
        "schedule": asdict(schedule),
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "ema": {"step": ema.optimization_step, "shadow": list(ema.shadow_params)},
    }
    new, kept, old = (folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(new, ignore_errors=True)
    save_tree(new, tree)
    # Two renames, so that at any moment one whole checkpoint has a name that `_resume` knows.
    shutil.rmtree(old, ignore_errors=True)
    if kept.exists():
        os.replace(kept, old)
    os.replace(new, kept)
    shutil.rmtree(old, ignore_errors=True)


def _resume(folder: Path, model: nn.Module, optimizer: Optimizer, ema: EMAModel) -> tuple[int, float]:
    folder.mkdir(parents=True, exist_ok=True)
    kept = next((folder / n for n in ("checkpoint", "checkpoint.old") if (folder / n / "state.json").exists()), None)
    if kept is None:
        return 0, 0.0
    tree = load_tree(kept)
    model.load_state_dict(tree["model"])
    optimizer.load_state_dict(tree["optimizer"])
    ema.optimization_step = tree["ema"]["step"]
    ema.shadow_params = tree["ema"]["shadow"]
    return tree["step"], tree["seconds"]
