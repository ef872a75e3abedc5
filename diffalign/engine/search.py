"""A search recipe from start to report: batch after batch of prompts side by side, each kept once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign import media, rewards
from diffalign.data import Prompt, read_prompts
from diffalign.engine.evaluate import Evaluation, score_images
from diffalign.engine.interrupt import Interrupt, deferred_interrupt
from diffalign.engine.load import load_policy
from diffalign.engine.output import claim
from diffalign.engine.run import Interrupted, load_heldout
from diffalign.engine.search_results import Results
from diffalign.engine.search_trace import result_row, trace_tensors
from diffalign.ledger import Ledger
from diffalign.policies import Policy
from diffalign.processes import process_state
from diffalign.recipe_problems import Problem, RecipeError
from diffalign.report.search import write_search_report
from diffalign.rewards import Reward
from diffalign.search import Budget, Found, PolicySpace, Search, search_class
from diffalign.search.best_of_n import BestOfN, roll_out
from diffalign.search.config import ChainConfig
from diffalign.search.pool import Pool

if TYPE_CHECKING:
    from diffalign.search_recipe import SearchRecipe


@dataclass
class Job:
    """The live objects of one recipe.

    Attributes:
        heldout: rewards that only judge, by name.
        budget: of each prompt.
        interrupted: whether a signal asked for the end.
        show: tells the progress of the prompts that are searched now.
    """

    recipe: SearchRecipe
    policy: Policy
    reward: Reward
    heldout: dict[str, Reward]
    search: Search
    budget: Budget
    interrupted: Interrupt
    show: Callable[[Pool], None] = lambda pool: None


def search(recipe: SearchRecipe, policy: Policy | None = None) -> Path:
    """Runs a recipe, or goes on with it where it ended, and returns the path of its report.

    Args:
        recipe: all that is to be done.
        policy: loaded already, in the place of the recipe's pipeline.

    Raises:
        FileExistsError, ValueError: the folder holds a training run, or a search by another recipe.
        RecipeError: several processes were started.
        Interrupted: Ctrl-C or SIGTERM; the prompts that are done stand.
        DiskRefused: the disk is full or fails; likewise.
    """
    if process_state().num_processes > 1:
        told = Problem(f"{process_state().num_processes} processes", "a search is one: leave out the launcher")
        raise RecipeError("search", [told])
    claim(Path(recipe.output_dir), resume=False)
    prompts = read(recipe)
    results = Results(recipe, len(prompts))
    if len(results.rows) < len(prompts):
        with deferred_interrupt() as interrupted:
            _search_all(build(recipe, interrupted, policy), results, prompts)
    results.close()
    return write_search_report(results.folder, recipe, results.rows)


def read(recipe: SearchRecipe) -> list[Prompt]:
    """The prompts that a recipe asks for."""
    asked = recipe.prompts
    found = read_prompts(asked) if isinstance(asked, str) else [Prompt(text, i) for i, text in enumerate(asked)]
    return found[: recipe.num_prompts]


def build(recipe: SearchRecipe, interrupted: Interrupt, policy: Policy | None = None) -> Job:
    """Loads everything that the recipe names, but the pipeline where a policy is given."""
    policy = policy or load_policy(recipe.pipeline)
    if recipe.adapter is not None:
        policy.load_lora(recipe.adapter.path)
    reward = rewards.weighted_sum([(rewards.load(term.name), term.weight) for term in recipe.rewards.train])
    reward = reward.to(policy.device)
    settings = chain(recipe).model_dump() | recipe.method.model_dump(exclude={"name"})
    return Job(
        recipe=recipe,
        policy=policy,
        reward=reward,
        heldout=load_heldout(recipe, reward.name, policy.device),
        search=search_class(recipe.method.name)(policy, reward, **settings),
        budget=Budget(**recipe.budget.model_dump()),
        interrupted=interrupted,
    )


def chain(recipe: SearchRecipe) -> ChainConfig:
    """The chain that a recipe searches."""
    return ChainConfig(**{name: getattr(recipe, name) for name in ChainConfig.model_fields})


def _search_all(job: Job, results: Results, prompts: Sequence[Prompt]) -> None:
    """Searches the prompts that are not done, batch after batch."""
    size = job.recipe.prompts_per_batch
    with _progress(job.budget, len(prompts)) as (show, finish):
        finish(len(results.rows))
        for start in range(len(results.rows), len(prompts), size):
            results.append(_search_batch(replace(job, show=show), results, prompts[start : start + size], start))
            finish(len(results.rows))


def _search_batch(job: Job, results: Results, prompts: Sequence[Prompt], start: int) -> list[dict[str, Any]]:
    """Searches some prompts side by side, writes their images and traces, and returns their rows."""
    space = PolicySpace(job.policy, job.reward, prompts, chain(job.recipe))
    pool, found = _explore(job, job.search, space)
    independent = found if isinstance(job.search, BestOfN) else None
    if independent is None and job.recipe.report_pool:
        best_of_n = search_class("best_of_n")(**chain(job.recipe).model_dump())
        _, independent = _explore(replace(job, show=lambda pool: None), best_of_n, space)
    apart = time.perf_counter()
    base, best = _judged(job, prompts, found)
    apart = (time.perf_counter() - apart) / len(prompts)
    rows = []
    for i, prompt in enumerate(prompts):
        name = f"{start + i:05d}"
        tensors = trace_tensors(found[i], len(prompts), independent and independent[i], pool.trees and pool.trees[i])
        row = result_row(prompt, found[i], base, best, i, job.reward.name)
        row["apart"] |= {"seconds": apart}
        if independent is not None and independent is not found:
            row["pool"] = independent[i].ledger.as_dict()
        images = {"base": base.images[i]} | ({"found": best.images[i]} if found[i].best_image is not None else {})
        row["images"] = {side: results.image(f"{name}-{side}", image) for side, image in images.items()}
        row["trace"] = results.trace(name, tensors)
        rows.append(row)
    return rows


def _explore(job: Job, search: Search, space: PolicySpace) -> tuple[Pool, list[Found]]:
    """Searches a space to the end of the budget, unless a signal asks for the end before."""
    for pool in search.stream(space, job.budget):
        job.show(pool)
        if job.interrupted:
            raise Interrupted(
                f"stopped; the prompts that are done stand in {job.recipe.output_dir}, and the same command goes on"
            )
    return pool, pool.found()


def _judged(job: Job, prompts: Sequence[Prompt], found: Sequence[Found]) -> tuple[Evaluation, Evaluation]:
    """The plain image of each prompt, and the one that was found (black where there is none), with their scores."""
    base = plain_images(job, prompts)
    images = [torch.zeros_like(base.images[0]) if f.best_image is None else f.best_image for f in found]
    best = Evaluation(list(prompts), torch.stack(images))
    where = {"device": job.policy.device, "batch_size": job.recipe.micro_batch_size or len(prompts)}
    score_images(base, {job.reward.name: job.reward} | job.heldout, **where)
    return base, score_images(best, job.heldout, **where)


@torch.no_grad()
def plain_images(job: Job, prompts: Sequence[Prompt]) -> Evaluation:
    """What the pipeline makes of each prompt's first noise, path (0,) of a search, without noise on the way."""
    space = PolicySpace(job.policy, job.reward, prompts, chain(job.recipe).model_copy(update={"eta": 0.0}))
    paths = [(0,)] * len(prompts)
    latents = roll_out(space, space.initial(torch.arange(len(prompts)), paths), paths)
    parts = [media.to_uint8(job.policy.decode(latents[part])).cpu() for part in space.micro_batches(len(prompts))]
    ledger = Ledger(decodes=len(prompts))
    for each in space.ledgers:
        ledger.add(each)
    return Evaluation(list(prompts), torch.cat(parts), ledger=ledger)


@contextmanager
def _progress(budget: Budget, prompts: int) -> Iterator[tuple[Callable[[Pool], None], Callable[[int], None]]]:
    """A bar of prompts with the time left; yields what tells of prompts under way, and of those that are done."""
    columns = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[told]}"), refresh_per_second=2) as bar:
        task, done = bar.add_task("searching", total=prompts, told=""), [0]

        def show(pool: Pool) -> None:
            space = pool.space
            parts = [spent(budget, ledger, space.seconds() / space.num_prompts) for ledger in space.ledgers]
            best = [best for best in map(pool.best, range(space.num_prompts)) if best == best]
            told = f"{space.num_prompts} prompts at {sum(parts) / len(parts):.0%}"
            told += f"  best reward {sum(best) / len(best):.3g}" if best else ""
            bar.update(task, completed=done[0] + sum(parts), told=told)

        def finish(count: int) -> None:
            done[0] = count
            bar.update(task, completed=count)

        yield show, finish


def spent(budget: Budget, ledger: Any, seconds: float) -> float:
    """The share of a prompt's budget that is spent, at most 1."""
    limits = (
        (budget.nfe, ledger.denoiser_evaluations),
        (budget.reward_calls, ledger.reward_calls),
        (budget.seconds, seconds),
    )
    return min(1.0, max(used / limit for limit, used in limits if limit is not None))
