"""The loop that every training method shares: optimiser, gradient step, history.

A method subclasses `Trainer` and writes `accumulate`: from prompts to gradients. What surrounds a run (checkpoints,
validation, reports) is `diffalign.engine`'s business; a `Trainer` alone is enough in a notebook.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.data import Prompt, PromptSampler
from diffalign.finetune.config import TrainingConfig
from diffalign.finetune.optimizer import make_optimizer
from diffalign.finetune.supervised import SupervisedTerm
from diffalign.ledger import Ledger
from diffalign.policies import Policy
from diffalign.processes import process_state
from diffalign.registry import Registry
from diffalign.rewards import Reward, Score, as_reward
from diffalign.settings import Settings

Row = dict[str, float]

TRAINERS: Registry[type[Trainer]] = Registry("trainer")
"""Methods by the name that a recipe gives them; `METHODS` has their settings under the same name."""


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on a CUDA device, elsewhere the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def divides(count: int, name: str, processes: int) -> None:
    """Raises ValueError for a count that cannot be the same on every process."""
    if count % processes:
        raise ValueError(f"{name} = {count} does not divide over {processes} processes; use a multiple of {processes}")


def reward_sums(score: Score) -> dict[str, Tensor]:
    """Sums over the images of what is reported of a score: it and its parts where it did not fail, and how often."""
    parts = {"reward": score.value} | {f"reward/{name}": part for name, part in score.parts.items()}
    sums = {name: torch.where(score.valid, part, torch.zeros_like(part)).sum() for name, part in parts.items()}
    return sums | {"reward_valid": score.valid.sum()}


class StepFailed(RuntimeError):
    """A step has no usable gradient: it is not finite, or every score failed. The update was not made."""


@dataclass
class History:
    """The rows that `train` produced, one a step: `history["reward"]` is that metric's list."""

    rows: list[Row] = field(default_factory=list)

    def __getitem__(self, metric: str) -> list[float]:
        return [row[metric] for row in self.rows if metric in row]

    def __len__(self) -> int:
        return len(self.rows)


class Trainer:
    """One training method on one policy and one reward.

    Args:
        policy: the pipeline to train. Without a trainable adapter it gets a LoRA of rank 8 on the attention.
        reward: a `Reward`, or any function `(images (B, 3, H, W) in [0, 1], prompts, metadata) -> (B,)`.
        **settings: the fields of `TrainingConfig` and of the method's own config.

    Gradients are summed over processes explicitly after the backward passes. A wrapper such as
    DistributedDataParallel would see only calls that go through it, and several per backward pass here, so it is not
    used. Where accelerate is configured for FSDP, only frozen weights are divided: see `Policy.shard_blocks`.
    """

    config_class: ClassVar[type[Settings]]
    supervised: SupervisedTerm | None = None

    def __init__(self, policy: Policy, reward: Reward | Callable[..., Any], **settings: Any) -> None:
        shared = {k: settings.pop(k) for k in list(settings) if k in TrainingConfig.model_fields}
        self.training = TrainingConfig(**shared)
        self.config = self.config_class(**settings)
        self.policy = policy
        self.reward = as_reward(reward).to(policy.device)
        process_state()  # joins the others, which an Accelerator that is the first to ask may not (see there)
        self.accelerator = Accelerator(mixed_precision=self.training.mixed_precision)
        if not policy.trainable():
            policy.add_lora(rank=8, alpha=8)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            policy.shard_blocks()
        if self.training.sft is not None:
            divides(self.training.sft.batch_size, "sft.batch_size", self.accelerator.num_processes)
            self.supervised = SupervisedTerm(policy, self.training.sft, self.training.seed)
        policy.set_gradient_checkpointing(self.training.gradient_checkpointing == "block")
        self._learn(list(policy.trainable().values()))

    def _learn(self, parameters: list[nn.Parameter]) -> None:
        """Makes the optimiser of some parameters, and what goes with it."""
        self.parameters = parameters
        self.optimizer = make_optimizer(parameters, self.training)
        self.lr_scheduler = get_scheduler(
            self.training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=self.training.lr_warmup_steps,
            num_training_steps=self.training.max_train_steps,
        )
        decay = self.training.ema_decay
        self.ema = None if decay is None else EMAModel(parameters, decay, foreach=True)
        self.step = 0  # training steps taken, each of one optimiser update or more

    def accumulate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], Ledger]:
        """Adds this process's share of the gradient of the step `self.step`, for `prompts` (this process's own).

        Losses are divided by the number of images of *all* processes, so that the sum over processes is the mean.
        Returns metrics as sums over this process's images (divided later), and the cost.
        """
        raise NotImplementedError

    def updates(self, prompts: Sequence[Prompt]) -> Iterator[tuple[dict[str, Tensor], Ledger]]:
        """Adds the gradients of the step's optimiser updates, one after another, each as `accumulate` does: by default
        one, that of `accumulate`. `prompts` are those of all processes; see `share`.
        """
        yield self.accumulate(self.share(prompts))

    @property
    def images(self) -> int:
        """Images of one optimiser update, of all processes."""
        return self.training.num_prompts_per_step * self.training.group_size

    def share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Of the prompts of all processes this one's own."""
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    def probe(self, prompts: Sequence[Prompt]) -> int:
        """Adds some gradient at the memory of a step whose images are all differentiated at once.

        Nothing but gradients changes. By default a step up to its optimiser, as `accumulate` has it. Returns the bytes
        that an image takes while others are differentiated.
        """
        self.accumulate(prompts)
        return 0

    def rows_at_once(self, count: int) -> int:
        """Of `count` images of this process those that are evaluated together."""
        return count if self.training.micro_batch_size == "auto" else min(count, self.training.micro_batch_size)

    def micro_batches(self, count: int) -> Iterator[slice]:
        """The rows of `count` images in parts that are evaluated together."""
        size = max(1, self.rows_at_once(count))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def train(
        self,
        prompts: Sequence[str | Prompt],
        steps: int | None = None,
        on_step: Callable[[Row], object] | None = None,
    ) -> History:
        """Trains for `steps` training steps (default: up to `max_train_steps`) and returns a row of metrics for each.

        `on_step` is called with each row. `train` continues where the last call ended.
        """
        end = self.training.max_train_steps if steps is None else self.step + steps
        history = History()
        for row in self.iterate(prompts, end):
            history.rows.append(row)
            if on_step is not None:
                on_step(row)
        return history

    def iterate(self, prompts: Sequence[str | Prompt], end: int) -> Iterator[Row]:
        """One row a step, from `self.step` to `end`: between two rows the state is whole and may be saved."""
        named = [Prompt(p, i, {}) if isinstance(p, str) else p for i, p in enumerate(prompts)]
        if not named:
            raise ValueError("prompts is empty; give at least one prompt")
        sampler = PromptSampler(named, self.training.num_prompts_per_step, self.training.seed)
        while self.step < end:
            yield self.take_step(sampler.batch(self.step))

    def take_step(self, prompts: Sequence[Prompt]) -> Row:
        """The optimiser updates of one step, on the prompts of all processes; returns their mean metrics."""
        started = time.perf_counter()
        divides(len(prompts), "num_prompts_per_step", self.accelerator.num_processes)
        updates, rows, ledger = self.updates(prompts), [], Ledger()
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            with self.accelerator.autocast():
                update = next(updates, None)
                if update is None:
                    break
                supervised = self._supervise(len(rows))
            rows.append(self._update(update[0] | supervised[0]))
            ledger.add(update[1] + supervised[1])
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        row = {"step": self.step + 1, **means, "learning_rate": self.lr_scheduler.get_last_lr()[0]}
        self.lr_scheduler.step()
        means = {name.removeprefix("reward/"): v for name, v in row.items() if name.startswith("reward/")}
        for reward in self._rewards():
            reward.observe(means)
        self.step += 1
        ledger.seconds = time.perf_counter() - started
        ledger.peak_memory_bytes = peak_memory(self.policy.device)
        images = len(prompts) * self.training.group_size
        return row | ledger.as_dict() | {"samples_per_s": images / ledger.seconds}

    def _supervise(self, update: int) -> tuple[dict[str, Tensor], Ledger]:
        """Adds this process's share of the gradient of `sft`; returns what `accumulate` does."""
        if self.supervised is None:
            return {}, Ledger()
        size, world = self.supervised.config.batch_size, self.accelerator.num_processes
        own = slice(self.accelerator.process_index, None, world)
        at_once = self.rows_at_once(min(size, self.images) // world)  # no more memory than the method's own images
        error, cost = self.supervised.accumulate(self.step, update, own, max(1, at_once))
        images = self.training.num_prompts_per_step * self.training.group_size
        return {"sft": error * (images / size)}, cost  # the mean over the batch, once it is divided by the images

    def _update(self, sums: dict[str, Tensor]) -> Row:
        """One optimiser update with the gradients that are there; returns its metrics."""
        self._sum_gradients()
        penalty = self._penalise()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        row = {**self._means(sums), **penalty, "grad_norm": float(grad_norm)}
        self._refuse(row)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return row

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the parameters are their moving average, where `ema_decay` asks for one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _penalise(self) -> Row:
        """Adds the gradient of `weight_l2`, the same on every process; returns what is reported."""
        if not self.training.weight_l2:
            return {}
        distance = self.policy.squared_update()
        (self.training.weight_l2 * distance).backward()
        return {"weight_l2": float(distance.detach())}

    def _refuse(self, row: Row) -> None:
        """Raises StepFailed for a step that must not be taken. The numbers are the same on every process."""
        if math.isnan(row["reward"]):
            raise StepFailed(
                f"step {self.step + 1}: every score of {self.reward.name!r} failed, so this update was not made. "
                "The first reason was logged as a warning; mend the reward and resume"
            )
        if not math.isfinite(row["grad_norm"]):
            raise StepFailed(
                f"step {self.step + 1}: the gradient is not finite (loss {row['loss']:.4g}), so this update "
                "was not made. Lower learning_rate or guidance_scale, or use a bfloat16 instead of a float16 base"
            )

    def _sum_gradients(self) -> None:
        """Makes every process hold the same gradient, the sum of all: one collective over one flat tensor.

        A parameter without gradient on any process stays without: the optimiser passes it over, as with one process.
        """
        if self.accelerator.num_processes == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        have = grads[0].new_tensor([p.grad is not None for p in self.parameters])
        flat = self.accelerator.reduce(torch.cat([have, *(g.reshape(-1) for g in grads)]), reduction="sum")
        have, *summed = flat.split([len(grads), *(g.numel() for g in grads)])
        for p, g, any_has in zip(self.parameters, summed, have.tolist(), strict=True):
            p.grad = g.view_as(p) if any_has else None

    def _means(self, sums: dict[str, Tensor]) -> Row:
        """Sums over this process's images -> means over all; one read from the device for all metrics."""
        images = self.training.num_prompts_per_step * self.training.group_size
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=self.policy.device) for v in sums.values()]
        )
        values = self.accelerator.reduce(values, reduction="sum") / images
        row = dict(zip(sums, values.tolist(), strict=True))
        # Rewards are means over the scores that did not fail.
        valid = row.pop("reward_valid", 1.0) or math.nan
        return {name: v / valid if name.startswith("reward") else v for name, v in row.items()}

    def _rewards(self) -> list[Reward]:
        """The reward and all that it is made of, each once."""
        return list({id(reward): reward for reward in self.reward.walk()}.values())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to be bit-equal: randomness is addressed by step and needs no state."""
        return self._progress() | {
            "adapter": {name: p.detach() for name, p in self.policy.trainable().items()},
            "rewards": [reward.state_dict() for reward in self._rewards()],
        }

    def _progress(self) -> dict[str, Any]:
        """What `_learn` made, and how far it is."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema and {"updates": self.ema.optimization_step, "parameters": self.ema.shadow_params},
        }

    def _load_progress(self, state: dict[str, Any]) -> None:
        """Takes back what `_progress` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None and state.get("ema"):  # without one in the checkpoint the average begins there
            self.ema.optimization_step = state["ema"]["updates"]
            self.ema.shadow_params = [p.to(self.policy.device) for p in state["ema"]["parameters"]]
        self.step = state["step"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; ValueError for the adapter of another recipe."""
        parameters = self.policy.trainable()
        missing = parameters.keys() ^ state["adapter"].keys()
        if missing:
            raise ValueError(
                f"the checkpoint's adapter and this recipe's differ in {len(missing)} tensors, {min(missing)} among "
                "them; resume with the adapter settings that the checkpoint was written with"
            )
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["adapter"][name])
        for reward, its in zip(self._rewards(), state["rewards"], strict=True):
            reward.load_state_dict(its)
        self._load_progress(state)
