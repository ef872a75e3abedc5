"""A recipe from start to report: train with checkpoints and validation, export the LoRA, compare on test prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign import media, report, rewards
from diffalign.config import write_resolved
from diffalign.data import Prompt, read_prompts
from diffalign.engine.changes import changes
from diffalign.engine.checkpoint import load_checkpoint, save_checkpoint
from diffalign.engine.evaluate import Evaluation, image_diversity, sample_images, score_images
from diffalign.engine.footprint import footprint
from diffalign.engine.interrupt import deferred_interrupt
from diffalign.engine.load import load_policy
from diffalign.engine.machine import GIB
from diffalign.engine.output import claim, refusals_explained
from diffalign.engine.parting import Parting
from diffalign.engine.shares import join, share
from diffalign.engine.summary import compare_with_reference
from diffalign.engine.tracking import Metrics
from diffalign.finetune import Trainer, trainer_class
from diffalign.finetune.config import TrainingConfig
from diffalign.finetune.trainer import Row
from diffalign.policies import Policy
from diffalign.rewards import Reward

if TYPE_CHECKING:
    from diffalign.config import Recipe

SPLITS = ("train", "validation", "test")
GRID_IMAGES = 32

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop and stopped after a checkpoint; the message says where and how to go on."""


@dataclass
class Run:
    """The live objects of one recipe."""

    recipe: Recipe
    output_dir: Path
    policy: Policy
    trainer: Trainer
    train_reward: Reward | None  # None: a method that learns from pairs, in a recipe whose rewards only judge
    heldout: dict[str, Reward]
    prompts: dict[str, list[Prompt]]
    parting: Parting = field(default_factory=Parting)

    @property
    def judges(self) -> dict[str, Reward]:
        """The training reward and the held-out ones, by name."""
        trained = {} if self.train_reward is None else {self.train_reward.name: self.train_reward}
        return trained | self.heldout

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.trainer.accelerator.is_main_process


def train(recipe: Recipe, policy: Policy | None = None) -> Path:
    """Runs a recipe and returns the path of its report, or of the card of the reward that it trains.

    Args:
        recipe: all that is to be done.
        policy: loaded already, in the place of the recipe's pipeline.

    Raises:
        FileExistsError: the folder holds a run and `resume_from_checkpoint` is not set: nothing is overwritten.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step was written.
        DiskRefused: the disk is full or fails; what was saved stands.
    """
    if recipe.method.name == "noisy_reward":  # trains no policy
        from diffalign.engine.reward_run import train_reward

        return train_reward(recipe, policy)
    output_dir = Path(recipe.output_dir)
    claim(output_dir, resume=recipe.resume_from_checkpoint is not None)
    run = build(recipe, policy)
    with refusals_explained(output_dir):
        return _train(run)


def _train(run: Run) -> Path:
    recipe, step = run.recipe, resume(run)
    metrics = Metrics(run.output_dir, recipe.report_to, resume_step=step, accelerator=run.trainer.accelerator)
    if run.is_main:
        write_resolved(recipe, run.output_dir / "config.yaml")
    if run.policy.device.type != "cpu":
        settle_micro_batch(run)
    if step == 0:
        first = validate(run)
        prove_gradient(run, first)
        metrics.append({"step": 0, **record_validation(run, first)})
    loop(run, metrics, lambda: record_validation(run, validate(run)), progress(run))
    metrics.close()
    if run.is_main:
        with run.trainer.averaged():
            run.policy.save_lora(run.output_dir / "lora")
    base, tuned = before_and_after(run)
    if run.is_main:
        summary = compare_with_reference(recipe, run.output_dir, run.judges, base, tuned, run.policy)
        report.write_report(run.output_dir, summary)
    run.trainer.accelerator.wait_for_everyone()
    return run.output_dir / "report.html"


def build(recipe: Recipe, policy: Policy | None = None) -> Run:
    """Loads everything that the recipe names, but the pipeline where a policy is given."""
    policy, adapter = policy or load_policy(recipe.pipeline), recipe.adapter
    if adapter.path is None:
        policy.add_lora(adapter.rank, adapter.alpha, adapter.target_modules, seed=recipe.seed)
    else:
        policy.load_lora(adapter.path)
    terms = [(rewards.load(r.name), r.weight) for r in recipe.rewards.train]
    train_reward = rewards.weighted_sum(terms) if terms else None
    shared = {name: getattr(recipe, name) for name in TrainingConfig.model_fields}
    trainer = trainer_class(recipe.method.name)(
        policy, train_reward, **shared, **recipe.method.model_dump(exclude={"name"})
    )
    return Run(
        recipe=recipe,
        output_dir=Path(recipe.output_dir),
        policy=policy,
        trainer=trainer,
        train_reward=train_reward,
        heldout=load_heldout(recipe, train_reward and train_reward.name, policy.device),
        prompts=read_splits(recipe, trainer),
    )


def read_splits(recipe: Recipe, trainer: Trainer) -> dict[str, list[Prompt]]:
    """The prompts of each split; those to train on are the trainer's own where it learns from pairs."""
    files = {split: getattr(recipe.prompts, split) for split in SPLITS}
    return {split: read_prompts(file) if file else list(trainer.prompts) for split, file in files.items()}


def load_heldout(recipe: Recipe, train_reward: str | None, device: torch.device) -> dict[str, Reward]:
    """The held-out rewards by their own names, which head columns and curves.

    Raises:
        ValueError: two rewards that the recipe names by file have one name, and would share a column.
    """
    found: dict[str, Reward] = {}
    for reward in (rewards.load(name).to(device) for name in recipe.rewards.heldout):
        if reward.name in (train_reward, *found):
            raise ValueError(
                f"two rewards of the recipe have the name {reward.name!r}: rename one in its reward recipe"
            )
        found[reward.name] = reward
    return found


def resume(run: Run) -> int:
    """Loads the checkpoint that the recipe asks for; returns the step to go on from, 0 for a new run."""
    asked, checkpoints = run.recipe.resume_from_checkpoint, run.output_dir / "checkpoints"
    if asked is None:
        return 0
    with run.trainer.accelerator.main_process_first():  # the first may put a checkpoint in its place
        found = load_checkpoint(checkpoints, asked)
    if found is None:
        logger.warning("no checkpoint in %s yet; starting from step 0", checkpoints)
        return 0
    step, tree = found
    run.trainer.load_state_dict(tree)
    run.parting.load_state_dict(tree.get("parting", {}))
    if run.trainer.training.micro_batch_size == "auto":
        kept = {"micro_batch_size": tree.get("micro_batch_size", "auto")}
        run.trainer.training = run.trainer.training.model_copy(update=kept)
    _tell_changes(run)
    return step


def _tell_changes(run: Run) -> None:
    """Warns of settings that are not those the run was begun with: what follows is then a mixture of both."""
    config = run.output_dir / "config.yaml"
    if run.is_main and config.exists():
        told = changes(run.recipe, config, beside=("output_dir", "resume_from_checkpoint", "max_train_steps"))
        if told:
            logger.warning("the run goes on with other settings than before: %s", "; ".join(told))


def settle_micro_batch(run: Run) -> None:
    """Where the recipe says `auto`, as many images at once as fit, by the estimate of `footprint`.

    A group may be divided, as its images add up to the same gradient. Every process takes what fits on the one with
    least room: where weights are divided, they must call the denoiser equally often. The number is kept in the
    checkpoints: a resumed run adds up in the same order.
    """
    trainer = run.trainer
    found = footprint(trainer, run.prompts["train"]) if trainer.training.micro_batch_size == "auto" else None
    if found is None:
        return
    smallest = min(gather_object([found.micro_batch_size]))
    trainer.training = trainer.training.model_copy(update={"micro_batch_size": smallest})
    logger.info(
        "micro_batch_size: %d of %d images at once; all of them take about %.1f of %.1f GiB",
        *(smallest, found.images, found.peak / GIB, found.room / GIB),
    )


def loop(
    run: Run,
    metrics: Metrics,
    validated: Callable[[], Row],
    shown: AbstractContextManager[Callable[[Row], None]],
) -> None:
    """Trains to `max_train_steps`: a row of metrics a step, validation and checkpoints at their intervals."""
    recipe, trainer, last = run.recipe, run.trainer, run.recipe.max_train_steps
    with deferred_interrupt() as interrupted, shown as show:
        for row in trainer.iterate(run.prompts["train"], last):
            step = trainer.step
            if step % recipe.evaluation.validation_steps == 0 or step == last:
                row |= validated()
            metrics.append(row)
            show(row)
            if step % recipe.checkpointing_steps == 0 or step == last or interrupted:
                checkpoint(run)
            if interrupted:
                raise Interrupted(
                    f"stopped after step {step} of {last}; resume_from_checkpoint=latest goes on from {run.output_dir}"
                )


def checkpoint(run: Run) -> None:
    """Every process waits, one writes."""
    if run.is_main:
        save_checkpoint(
            run.output_dir / "checkpoints",
            run.trainer.step,
            run.trainer.state_dict()
            | {"parting": run.parting.state_dict(), "micro_batch_size": run.trainer.training.micro_batch_size},
            total_limit=run.recipe.checkpoints_total_limit,
        )
    run.trainer.accelerator.wait_for_everyone()


def evaluate(run: Run, split: str, limit: int | None) -> Evaluation:
    """Samples and scores the first `limit` prompts of a split with the recipe's evaluation settings.

    Processes share the work, and all must call this together.
    """
    prompts, accelerator = run.prompts[split][:limit], run.trainer.accelerator
    mine = share(prompts, accelerator.process_index, accelerator.num_processes)
    with run.trainer.averaged():
        part = sample_images(run.policy, mine, seed=run.recipe.seed, **run.recipe.evaluation.sampling())
    of_sets = {name: judge for name, judge in run.judges.items() if judge.setwise}
    each = {name: judge for name, judge in run.judges.items() if name not in of_sets}
    whole = join(score_images(part, each, device=run.policy.device), prompts, accelerator)
    return score_images(whole, of_sets)  # of the images of all processes


def validate(run: Run) -> Evaluation:
    """The fixed validation prompts under the adapter as it is, or its moving average."""
    return evaluate(run, "validation", run.recipe.evaluation.num_validation_prompts)


def record_validation(run: Run, evaluation: Evaluation) -> Row:
    """The metrics of a validation; its picture goes to `samples/`."""
    if run.is_main:
        folder = run.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = media.grid(media.from_uint8(evaluation.images[:GRID_IMAGES]))
        media.save_png(picture, folder / f"validation-{run.trainer.step:06d}.png")
    means = evaluation.means()
    row = {f"heldout/{name}": means[name] for name in run.heldout}
    if run.train_reward is not None:
        proxy, checkpoints = run.train_reward.name, run.output_dir / "checkpoints"
        row[f"validation/{proxy}"] = means[proxy]
        for sentence in run.parting.look(run.trainer.step, evaluation, proxy, checkpoints):
            if run.is_main:
                logger.warning("%s", sentence)
    spread = image_diversity(evaluation, run.judges)
    return row if spread is None else row | {"diversity": spread.overall}


def prove_gradient(run: Run, evaluation: Evaluation) -> None:
    """Contract 7: before training, a differentiable reward's gradient is there on images of the policy itself."""
    if run.train_reward is None or not run.train_reward.differentiable:
        return  # a method that needs the gradient has refused it when it was built
    few = slice(0, 4)
    prompts = evaluation.prompts[few]
    images = media.from_uint8(evaluation.images[few]).to(run.policy.device)
    rewards.check_gradient(run.train_reward, images, [p.text for p in prompts], [p.metadata for p in prompts])


def before_and_after(run: Run) -> tuple[Evaluation, Evaluation]:
    """The test prompts, read once, under the reference and under the adapter, from the same noise."""
    limit = run.recipe.evaluation.num_test_prompts
    tuned = evaluate(run, "test", limit)
    with run.policy.reference():
        return evaluate(run, "test", limit), tuned


@contextmanager
def progress(run: Run) -> Iterator[Callable[[Row], None]]:
    """A bar on the main process: step, rewards, distance to the reference, speed, time left. Yields its update."""
    columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[told]}"), disable=not run.is_main) as bar:
        steps = run.recipe.max_train_steps
        task = bar.add_task("training", total=steps, completed=run.trainer.step, told="")
        heldout: dict[str, float] = {}

        def show(row: Row) -> None:
            heldout.update({name.removeprefix("heldout/"): v for name, v in row.items() if name.startswith("heldout/")})
            told = {
                **{name: row[name] for name in ("reward", "implicit_accuracy") if name in row},
                **heldout,
                **({"distance": row["prediction_mse"]} if "prediction_mse" in row else {}),
                "images/s": row["samples_per_s"],
            }
            bar.update(
                task, completed=row["step"], told="  ".join(f"{name} {value:.3g}" for name, value in told.items())
            )

        yield show
