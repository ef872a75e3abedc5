"""A recipe tried out in seconds: tiny random weights of the same classes, two steps, a report; nothing is kept."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffalign.data import PromptSampler, read_prompts
from diffalign.data.cache import check_folder
from diffalign.engine.checkpoint import load_checkpoint
from diffalign.engine.load import load_policy
from diffalign.engine.run import train
from diffalign.engine.stand_ins import (
    missing_reward,
    write_pipeline,
    write_random_images,
    write_random_pairs,
    write_reward,
)
from diffalign.finetune import trainer_class
from diffalign.finetune.config import SFTConfig, TrainingConfig
from diffalign.policies import Policy
from diffalign.processes import process_state
from diffalign.recipe_problems import Problem, RecipeError

if TYPE_CHECKING:
    from diffalign.config import Recipe
    from diffalign.settings import Settings

STEPS = 2
FEW = 2  # prompts of a minibatch, of validation and of the test


def dry_run(recipe: Recipe) -> str:
    """Runs a small copy of a recipe in a temporary folder and returns a sentence: what was checked, and what was not.

    Method, rewards, prompts, sampling and optimiser are the recipe's; weights are tiny and random, steps, prompts and
    images few.

    Raises:
        RecipeError: nothing on this machine says the class of the pipeline, a reward of videos is not on this machine,
            or several processes were started.
        ValueError: the method refuses the recipe, or there are too few prompts.
    """
    if process_state().num_processes > 1:
        processes = str(process_state().num_processes)
        raise RecipeError("--dry-run", [Problem(f"{processes} processes", "a dry run is one: leave out the launcher")])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="diffalign-dry-run-") as scratch:
        folder = Path(scratch)
        name, own_scheduler = write_pipeline(recipe.pipeline, folder / "pipeline")
        small, unchecked = reduced(recipe, folder)
        check_counts(recipe, small)
        train(small, tiny_policy(small))
        load_checkpoint(folder / "run" / "checkpoints")
    seconds = time.perf_counter() - started
    if not own_scheduler:
        unchecked.insert(0, "the pipeline's scheduler (not on this machine: the usual one stood in)")
    return (
        f"The recipe ran in {seconds:.0f} s on a tiny random {name}: {STEPS} steps of rollout, reward, gradient and "
        "optimiser, validation, checkpoint, LoRA and report. Not checked: "
        f"{'; '.join(['weights and tokenizers of the pipeline', 'images of its size', 'memory', *unchecked])}."
    )


def tiny_policy(small: Recipe) -> Policy:
    """The stand-in of the pipeline, loaded."""
    policy = load_policy(small.pipeline)
    if hasattr(policy.pipe, "default_sample_size"):
        policy.pipe.default_sample_size = 8  # FLUX and Qwen-Image keep it in the class and not in a config
    return policy


def check_counts(recipe: Recipe, small: Recipe) -> None:
    """Asks method and prompts about the recipe's own counts, of which the small ones would hide what they refuse.

    Raises:
        ValueError: as the method, or as `PromptSampler`.
    """
    prompts = [] if recipe.prompts.train is None else read_prompts(recipe.prompts.train)
    if recipe.method.name != "noisy_reward":  # trains no policy
        shared = {name: getattr(small, name) for name in TrainingConfig.model_fields}
        shared |= {name: getattr(recipe, name) for name in ("num_prompts_per_step", "group_size")}
        own = {name: getattr(recipe.method, name, None) for name in ("num_minibatches", "top_k")}
        own = small.method.model_dump(exclude={"name"}) | {name: n for name, n in own.items() if n is not None}
        trainer = trainer_class(recipe.method.name)(tiny_policy(small), _brightness, **shared, **own)
        prompts = prompts or list(trainer.prompts)
    PromptSampler(prompts, recipe.num_prompts_per_step, recipe.seed)


def _brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that any method takes, and that none is asked for."""
    return images.mean((1, 2, 3))


def reduced(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe with the stand-ins of `folder` and small counts, and what that leaves unchecked."""
    unchecked = []
    pipeline: dict[str, Any] = {"path": str(folder / "pipeline"), "revision": None, "resolution": None}
    cpu, optimizer = process_state().device.type == "cpu", recipe.optimizer
    if recipe.pipeline.attention != "auto" and cpu:
        pipeline["attention"] = "auto"
        unchecked.append(f"attention {recipe.pipeline.attention} (there is no GPU here)")
    if optimizer != "adamw" and cpu:
        unchecked.append(f"{optimizer} (there is no GPU here: adamw stood in)")
        optimizer = "adamw"
    if recipe.pipeline.tiny_decoder is not None:
        pipeline["tiny_decoder"] = None
        unchecked.append(f"the tiny decoder {recipe.pipeline.tiny_decoder}")
    if recipe.adapter.path is not None:
        unchecked.append(f"the LoRA {recipe.adapter.path}")
    trackers = [name for name in recipe.report_to if name == "tensorboard"]
    unchecked += [name for name in recipe.report_to if name not in trackers]
    names = {}
    for number, name in enumerate([*(term.name for term in recipe.rewards.train), *recipe.rewards.heldout]):
        missing = missing_reward(name)
        if missing is not None:
            names[name] = str(write_reward(missing, folder / f"reward-{number}"))
            unchecked.append(f"{missing.name} (not on this machine: a tiny random one stood in)")
    terms = [term.model_copy(update={"name": names.get(term.name, term.name)}) for term in recipe.rewards.train]
    heldout = [names.get(name, name) for name in recipe.rewards.heldout]
    evaluation = {"num_validation_prompts": FEW, "num_test_prompts": FEW, "validation_steps": STEPS}
    evaluation["num_images_per_prompt"] = min(recipe.evaluation.num_images_per_prompt, 2)
    method = reduced_method(recipe, folder, unchecked)
    of_step = FEW * getattr(method, "num_minibatches", 1)  # a reward of sets asks for some samples in each minibatch
    changes = {
        "pipeline": recipe.pipeline.model_copy(update=pipeline),
        "adapter": recipe.adapter.model_copy(update={"path": None}),
        "rewards": recipe.rewards.model_copy(update={"train": terms, "heldout": heldout}),
        "evaluation": recipe.evaluation.model_copy(update=evaluation),
        "method": method,
        "sft": reduced_sft(recipe.sft, folder, unchecked),
        "optimizer": optimizer,
        "num_prompts_per_step": min(recipe.num_prompts_per_step, of_step),
        "group_size": min(recipe.group_size, 4),
        "max_train_steps": STEPS,
        "output_dir": str(folder / "run"),
        "resume_from_checkpoint": None,
        "report_to": trackers,
    }
    return recipe.model_copy(update=changes), unchecked


def reduced_sft(sft: SFTConfig | None, folder: Path, unchecked: list[str]) -> SFTConfig | None:
    """Few of the supervised images; where they are not there, some are made up and told."""
    if sft is None:
        return None
    changes: dict[str, Any] = {"batch_size": FEW, "cache": None}
    if sft.cache is not None:
        check_folder(sft.cache)
    if not Path(sft.images).exists():
        changes["images"] = str(write_random_images(folder / "images"))
        unchecked.append(f"the images {sft.images} (not on this machine: random ones stood in)")
    return sft.model_copy(update=changes)


def reduced_method(recipe: Recipe, folder: Path, unchecked: list[str]) -> Settings:
    """The recipe's method for few prompts and a small denoiser; pairs that are not there are made up and told."""
    method: Any = recipe.method  # of any kind: only some have these settings
    changes: dict[str, Any] = {}
    if hasattr(method, "blocks"):  # of the denoiser, and the tiny ones have two
        changes["blocks"] = 1
    if hasattr(method, "num_minibatches"):
        changes["num_minibatches"] = min(method.num_minibatches, FEW)
    if hasattr(method, "top_k"):  # of the samples of a prompt, and here they are few
        changes["top_k"] = 1
    if getattr(method, "cache", None) is not None:
        check_folder(method.cache)
        changes["cache"] = None  # no place for what random weights make
    if hasattr(method, "pairs") and not Path(method.pairs).exists():
        write_random_pairs(folder / "pairs.parquet", recipe.num_prompts_per_step)
        changes["pairs"] = str(folder / "pairs.parquet")
        unchecked.append(f"the pairs {method.pairs} (not on this machine: random ones stood in)")
    return method.model_copy(update=changes)
