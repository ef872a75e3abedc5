"""A recipe that trains a noise-aware reward: samples and their scores, the heads, accuracy by noise level."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from diffalign import rewards
from diffalign.config import write_resolved
from diffalign.data import Prompt, read_prompts
from diffalign.engine.interrupt import deferred_interrupt
from diffalign.engine.load import load_policy
from diffalign.engine.output import claim, refusals_explained
from diffalign.engine.run import Interrupted, Run, loop, resume
from diffalign.engine.tracking import Metrics
from diffalign.finetune.config import TrainingConfig
from diffalign.finetune.noisy_reward import NoisyRewardTrainer, refuse_regularisers
from diffalign.finetune.noisy_reward_config import NoisyRewardConfig
from diffalign.finetune.noisy_reward_samples import sample_and_score
from diffalign.finetune.trainer import Row
from diffalign.policies import Policy
from diffalign.processes import process_state
from diffalign.rewards import Reward, noisy

if TYPE_CHECKING:
    from diffalign.config import Recipe


def train_reward(recipe: Recipe, policy: Policy | None = None) -> Path:
    """Runs a recipe of method `noisy_reward` and returns the path of the card of the reward.

    The recipe's training rewards are the judges, and name the objectives; its prompts' splits are drawn once, scored
    and kept in ``choices/``, so that a run that was stopped while drawing goes on there too.

    Args:
        recipe: all that is to be done.
        policy: loaded already, in the place of the recipe's pipeline.

    Raises:
        FileExistsError, Interrupted, DiskRefused: as `diffalign.engine.run.train`.
        ValueError: one image a prompt, settings that hold a policy, two rewards of one name, or a reward that compares
            the images of a prompt.
    """
    output_dir = Path(recipe.output_dir)
    if recipe.group_size < 2:
        raise ValueError(f"group_size = {recipe.group_size}: a choice is between images of a prompt, use 2 or more")
    refuse_regularisers(recipe)
    claim(output_dir, resume=recipe.resume_from_checkpoint is not None)
    with refusals_explained(output_dir):
        policy = policy or load_policy(recipe.pipeline)
        judges = load_judges(recipe, policy.device)
        splits = choices_of(recipe, policy, list(judges.values()), output_dir / "choices")
        return _train(recipe, policy, judges, splits)


def _train(recipe: Recipe, policy: Policy, judges: Mapping[str, Reward], splits: Mapping[str, noisy.Choices]) -> Path:
    method, output_dir = _method(recipe), Path(recipe.output_dir)
    weights = {name: term.weight for name, term in zip(judges, recipe.rewards.train, strict=True)}
    reward = noisy.NoisyReward(policy, weights, blocks=method.blocks, hidden=method.hidden, seed=recipe.seed)
    shared = {name: getattr(recipe, name) for name in TrainingConfig.model_fields}
    trainer = NoisyRewardTrainer(reward, splits["train"], **shared, **method.model_dump(exclude={"name"}))
    mix = rewards.weighted_sum([(judge, weights[name]) for name, judge in judges.items()])
    run = Run(recipe, output_dir, policy, trainer, mix, {}, {"train": trainer.prompts})
    step = resume(run)
    if run.is_main:
        write_resolved(recipe, output_dir / "config.yaml")
    with closing(Metrics(output_dir, recipe.report_to, resume_step=step, accelerator=trainer.accelerator)) as metrics:
        if step == 0:
            metrics.append({"step": 0, **validation(trainer, splits["validation"])})
        loop(run, metrics, lambda: validation(trainer, splits["validation"]), progress(run))
    if run.is_main:
        with trainer.averaged():
            write(output_dir / "reward", reward, noisy.accuracies(reward, splits["test"]), splits["test"])
    trainer.accelerator.wait_for_everyone()
    return output_dir / "reward" / "README.md"


def load_judges(recipe: Recipe, device: torch.device) -> dict[str, Reward]:
    """The training rewards by name; ValueError for two of one name, or one that compares the images of a prompt."""
    found: dict[str, Reward] = {}
    for judge in (rewards.load(term.name).to(device) for term in recipe.rewards.train):
        if judge.name in found:
            raise ValueError(f"two training rewards have the name {judge.name!r}: rename one in its reward recipe")
        if judge.groupwise:
            raise ValueError(f"reward {judge.name!r} compares the images of a prompt: use one that scores each image")
        found[judge.name] = judge
    return found


def choices_of(recipe: Recipe, policy: Policy, judges: list[Reward], folder: Path) -> dict[str, noisy.Choices]:
    """Choices of each split, from samples that are drawn once. What is a tie is settled on the training split."""
    limits = {
        "train": recipe.num_prompts_per_step * recipe.max_train_steps,  # no more than the steps can take
        "validation": recipe.evaluation.num_validation_prompts,
        "test": recipe.evaluation.num_test_prompts,
    }
    prompts = {split: read_prompts(getattr(recipe.prompts, split))[:limit] for split, limit in limits.items()}
    drawn = {split: draw(recipe, policy, judges, folder, split, prompts[split]) for split in prompts}
    margins = noisy.tie_margins(drawn["train"]["values"], _method(recipe).ties)
    return {
        split: noisy.Choices.from_values(found["latents"], found["values"], [p.text for p in prompts[split]], margins)
        for split, found in drawn.items()
    }


def draw(
    recipe: Recipe, policy: Policy, judges: list[Reward], folder: Path, split: str, prompts: list[Prompt]
) -> dict[str, torch.Tensor]:
    """Samples of a split and their scores, in files of a few prompts that processes share among them."""
    state = process_state()
    size = max(1, recipe.evaluation.batch_size // recipe.group_size)
    files = {folder / f"{split}-{i:06d}.safetensors": prompts[i : i + size] for i in range(0, len(prompts), size)}
    folder.mkdir(parents=True, exist_ok=True)
    how = {"config": _method(recipe), "group_size": recipe.group_size, "seed": recipe.seed}
    with deferred_interrupt() as interrupted:
        for number, (file, few) in enumerate(files.items()):
            if number % state.num_processes == state.process_index and not file.exists():
                part = file.with_suffix(".part")
                save_file(sample_and_score(policy, few, judges, **how), part)
                part.rename(file)
            if interrupted:
                raise Interrupted(
                    f"stopped after {number + 1} of {len(files)} parts of the {split} samples; "
                    f"resume_from_checkpoint=latest goes on from {folder.parent}"
                )
    state.wait_for_everyone()
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in ("latents", "values")}


def validation(trainer: NoisyRewardTrainer, choices: noisy.Choices) -> Row:
    """Accuracy on the validation choices by objective and noise coefficient."""
    with trainer.averaged():
        table = noisy.accuracies(trainer.learner, choices)
    return {f"validation/{name}@{at}": share for name, row in table.items() for at, share in row.items()}


def write(
    folder: Path, reward: noisy.NoisyReward, table: Mapping[str, Mapping[str, float]], choices: noisy.Choices
) -> None:
    """The reward, its figures as JSON, and a card that shows them."""
    reward.save(folder)
    (folder / "figures.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(reward, table, choices), encoding="utf-8")


def card(reward: noisy.NoisyReward, table: Mapping[str, Mapping[str, float]], choices: noisy.Choices) -> str:
    """What the reward is and how often it is right, in Markdown."""
    pairs = (choices.outcome.abs() == 1).sum((0, 1)).tolist()
    counted = ", ".join(f"{n} by {name}" for name, n in zip(table, pairs, strict=True))
    rows = [["noise coefficient", *(f"{sigma:g}" for sigma in noisy.SIGMAS)], ["---"] * (1 + len(noisy.SIGMAS))]
    rows += [[name, *(f"{share:.3f}" for share in row.values())] for name, row in table.items()]
    shown = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# A noise-aware reward

The first {reward.trunk.blocks} blocks of a {reward.trunk.denoiser_class}, and a head for each objective. Share of the
decided test pairs that are ranked right ({counted}; {len(choices)} prompts):

{shown}

`diffalign.rewards.noisy.NoisyReward.load(folder, policy)` reads it, with the policy that it was trained on.
"""


@contextmanager
def progress(run: Run) -> Iterator[Callable[[Row], None]]:
    """A bar on the main process: step, loss, agreement with the training choices, time left. Yields its update."""
    columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[told]}"), disable=not run.is_main) as bar:
        task = bar.add_task("", total=run.recipe.max_train_steps, completed=run.trainer.step, told="")

        def show(row: Row) -> None:
            told = {"loss": row["loss"], **{k: v for k, v in row.items() if k.startswith("agreement/")}}
            text = "  ".join(f"{name.removeprefix('agreement/')} {value:.3g}" for name, value in told.items())
            bar.update(task, completed=row["step"], told=text)

        yield show


def _method(recipe: Recipe) -> NoisyRewardConfig:
    assert isinstance(recipe.method, NoisyRewardConfig)
    return recipe.method
