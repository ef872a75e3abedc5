"""Whether a recipe is well before it trains: each check has a verdict, a figure and, where something is off, a remedy.

The recipe is loaded as training would load it, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffalign import media, rewards
from diffalign.data import Prompt
from diffalign.data.cache import check_folder
from diffalign.engine.evaluate import sample_images
from diffalign.engine.footprint import footprint
from diffalign.engine.machine import GIB, free_disk
from diffalign.engine.pipeline_call import as_latents, call_arguments
from diffalign.engine.run import Run, build
from diffalign.laws import default_law
from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tables import as_ddim, as_flow_euler
from diffalign.rollout import rollout, transition

if TYPE_CHECKING:
    from diffalign.config import Recipe

STEPS = 4  # of sampling, where a check needs images and not good ones


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        check: what was looked at.
        verdict: FAIL where training would be wrong or break.
        figure: what was found.
        remedy: what to do, "" where all is well.
    """

    check: str
    verdict: Literal["PASS", "WARN", "FAIL"]
    figure: str
    remedy: str = ""


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Loads a recipe and checks it, one finding after the other. What breaks is a finding too, and the rest goes on."""
    if recipe.method.name == "noisy_reward":
        remedy = "try it out with diffalign train RECIPE --dry-run"
        yield Finding("method", "WARN", "noisy_reward trains a reward and no policy: nothing was looked at", remedy)
        return
    try:
        run = build(without_caches(recipe))
    except Exception as error:  # whatever the libraries below say is what the user must hear
        yield _broken("loading", error)
        return
    numbers = sum(p.numel() for p in run.policy.denoiser.parameters())
    kind = f"{type(run.policy.pipe).__name__}, a denoiser of {numbers / 1e6:,.1f} M in {recipe.pipeline.dtype}"
    yield Finding("loading", "PASS", f"{kind} on {run.policy.device}; {', '.join(run.judges)}")
    for name, check in CHECKS.items():
        try:
            yield check(run)
        except Exception as error:
            yield _broken(name, error)


def without_caches(recipe: Recipe) -> Recipe:
    """The recipe with nothing kept on disk; ValueError for a folder that could not be."""
    holders = {name: getattr(recipe, name) for name in ("method", "sft")}
    kept = {name: holder for name, holder in holders.items() if getattr(holder, "cache", None) is not None}
    for holder in kept.values():
        check_folder(holder.cache)
    return recipe.model_copy(update={n: holder.model_copy(update={"cache": None}) for n, holder in kept.items()})


def _broken(check: str, error: Exception) -> Finding:
    return Finding(check, "FAIL", f"{type(error).__name__}: {error}", "mend what the message names, then ask again")


def parity(run: Run) -> Finding:
    """The latents of our sampler without noise and of the pipeline's own call, from the same noise.

    Schedulers are set to DDIM or Euler on both sides, for a policy reads a scheduler's tables and never steps it; LCM's
    stays, at one step, where it draws no noise.
    """
    policy, prompt = run.policy, run.prompts["validation"][0]
    guidance = run.recipe.evaluation.guidance_scale
    with _plain_scheduler(policy) as steps:
        schedule = policy.schedule(steps)
        law = default_law(schedule.kind)
        where = {"rows": [(prompt.id, 0)], "seed": run.recipe.seed, "guidance_scale": guidance}
        ours = rollout(policy, policy.encode([prompt.text]), law, schedule, **where).latents
        theirs = call_pipeline(policy, prompt.text, first_state(run, prompt), steps, guidance)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    bound = 1e-4 if policy.dtype in (torch.float32, torch.float64) else 5e-2
    figure = f"latents differ by {difference:.1g} of the largest, after {steps} steps (bound {bound:g})"
    if difference <= bound:
        return Finding("sampler equals diffusers' own", "PASS", figure)
    return Finding(
        "sampler equals diffusers' own",
        "FAIL",
        figure,
        "look for a pipeline setting that policies do not follow: its class in `diffalign.policies` lists them",
    )


def first_state(run: Run, prompt: Prompt) -> Tensor:
    """The state (1, C, h, w) that the first rollout of a prompt starts from."""
    policy = run.policy
    where = {"device": policy.device, "dtype": policy.state_dtype}
    return policy.initial_latents(
        normal(policy.latent_shape(), seed=run.recipe.seed, purpose="initial", rows=[(prompt.id, 0)], **where)
    )


@contextmanager
def _plain_scheduler(policy: Policy) -> Iterator[int]:
    """Sets a scheduler that draws no noise and has no memory, for the number of steps that it gives."""
    own = policy.pipe.scheduler
    lcm = type(own).__name__ == "LCMScheduler"
    if not lcm:
        flow = policy.schedule(STEPS).kind == "flow"
        policy.pipe.scheduler = as_flow_euler(own) if flow else as_ddim(own)
    try:
        yield 1 if lcm else 2
    finally:
        policy.pipe.scheduler = own


def call_pipeline(policy: Policy, prompt: str, noise: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """The latents (1, C, h, w) that the pipeline itself draws from a state."""
    pipe, (_, h, w) = policy.pipe, policy.latent_shape()
    height, width = h * pipe.vae_scale_factor, w * pipe.vae_scale_factor
    settings = call_arguments(policy, steps, guidance_scale) | {"height": height, "width": width}
    latents = as_latents(pipe, noise).to(policy.dtype)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        drawn = pipe([prompt], latents=latents, output_type="latent", **settings).images
    finally:
        pipe.set_progress_bar_config(**bar)
    if latents.ndim < noise.ndim:
        drawn = pipe._unpack_latents(drawn, height, width, pipe.vae_scale_factor)
    return drawn.reshape(noise.shape).to(noise)


def ratio(run: Run) -> Finding:
    """Log-ratios of a stochastic rollout's own steps, evaluated again with a graph: exactly 0 before weights move."""
    policy, prompts = run.policy, run.prompts["train"][:2]
    schedule = policy.schedule(STEPS)
    law = default_law(schedule.kind, None)
    condition = policy.encode([p.text for p in prompts])
    scale = run.recipe.evaluation.guidance_scale
    rows = [(p.id, i) for i, p in enumerate(prompts)]
    sizes = []
    with run.trainer.accelerator.autocast():
        drawn = rollout(
            policy,
            condition,
            law,
            schedule,
            rows=rows,
            seed=run.recipe.seed,
            guidance_scale=scale,
            record_states=True,
            record_transitions=True,
        )
        states, transitions = drawn.states or [], drawn.transitions or []
        for i in drawn.stochastic.nonzero().flatten().tolist():
            now = transition(policy, drawn, condition, law, schedule, i, guidance_scale=scale)
            sizes.append(now.log_ratio(states[i + 1], transitions[i], "sum").detach().abs().max())
    worst = float(torch.stack(sizes).max())  # a NaN stays one
    figure = f"log-ratios up to {worst:.1g} nats ({law!r})"
    if worst == 0:
        return Finding("ratio is 1 on policy", "PASS", figure)
    remedy = "sampling and training evaluate differently here: try attention 'math', or mixed_precision no"
    return Finding("ratio is 1 on policy", "WARN" if worst < 1e-2 else "FAIL", figure, remedy)


def reward_gradient(run: Run) -> Finding:
    """The reward's gradient on the policy's own images, and beside it a finite difference of one 8-bit level."""
    name, reward, few = "reward gradient", run.train_reward, run.prompts["validation"][:2]
    if reward is None:
        return Finding(name, "PASS", "no reward trains: the method learns from pairs")
    if not reward.differentiable:
        return Finding(name, "PASS", f"{reward.name} has none, and the method needs none")
    scale = run.recipe.evaluation.guidance_scale
    drawn = sample_images(
        run.policy, few, num_inference_steps=STEPS, guidance_scale=scale, seed=run.recipe.seed, batch_size=1
    )
    levels = drawn.images.to(run.policy.device)
    images = media.from_uint8(levels).requires_grad_()
    told = [p.text for p in few], [p.metadata for p in few]
    norms = rewards.check_gradient(reward, images, *told)
    value = reward(images, *told).value
    (gradient,) = torch.autograd.grad(value.sum(), images)
    # Scorers round to 8 bits, so the step is one level: along the gradient's sign, where both are levels.
    step = gradient.sign() * ((levels > 0) & (levels < 255)) / 255
    with torch.no_grad():
        up, down = (reward((images + side * step).clamp(0, 1), *told).value for side in (1, -1))
    expected, found = (gradient * step).flatten(1).sum(1), (up - down) / 2
    norm = f"{reward.name}: norm {float(norms.min()):.2g} to {float(norms.max()):.2g}"
    clear = expected.abs() > 1e-5 * value.detach().abs().clamp(min=1e-2)
    if not clear.any():
        return Finding(name, "PASS", f"{norm}; too small for a finite difference in float32")
    off = float(((found - expected)[clear] / expected[clear]).abs().max())
    figure = f"{norm}; a finite difference is off by {100 * off:.1f} %"
    if off <= 0.2:
        return Finding(name, "PASS", figure)
    if (found[clear] / expected[clear]).min() > 0:
        return Finding(name, "WARN", figure, "the reward bends or rounds within one level: see that it learns")
    return Finding(name, "FAIL", figure, "the gradient points where the reward does not rise: mend its backward pass")


def identity(run: Run) -> Finding:
    """The first prediction with the adapter and without: equal, unless the recipe starts from a LoRA."""
    policy, prompt = run.policy, run.prompts["train"][0]
    condition, schedule = policy.encode([prompt.text]), policy.schedule(STEPS)
    x = first_state(run, prompt)
    level = schedule.level(0, policy.device).expand(1)
    with torch.no_grad():
        tuned = policy.predict(x, level, condition).output
        with policy.reference():
            base = policy.predict(x, level, condition).output
    difference = float((tuned - base).abs().max() / base.abs().max().clamp(min=1e-12))
    path = run.recipe.adapter.path
    if path is not None:
        figure = f"starts from {path}, which changes the first prediction by {difference:.1g}"
        remedy = "" if difference else "this LoRA changes nothing: see that it is the one that you mean"
        return Finding("adapter at the start", "PASS" if difference else "WARN", figure, remedy)
    figure = f"changes the first prediction by {difference:g}"
    if difference == 0:
        return Finding("adapter at the start", "PASS", figure)
    return Finding("adapter at the start", "FAIL", figure, "a new LoRA must be the identity: report this")


def memory(run: Run) -> Finding:
    """The peak of a training step, from the forward and backward passes of one image and of two."""
    found = footprint(run.trainer, run.prompts["train"])
    if found is None:
        return Finding("memory", "WARN", "cannot be measured here", "watch the first steps, or ask on Linux or CUDA")
    figure = (
        f"about {found.peak / GIB:.1f} of {found.room / GIB:.1f} GiB for {found.images} images at once, "
        f"{found.per_image / 2**20:,.0f} MiB each"
    )
    if found.peak <= 0.9 * found.room:
        return Finding("memory", "PASS", figure)
    if found.fitting:
        remedy = f"set micro_batch_size={found.fitting} (it changes no result)"
    else:
        remedy = "set gradient_checkpointing=block, pipeline.dtype=bfloat16 or a smaller model"
    return Finding("memory", "WARN" if found.peak <= found.room else "FAIL", figure, remedy)


def disk(run: Run) -> Finding:
    """Room for the checkpoints that the recipe keeps, and for the one that is written before an old one goes."""
    recipe = run.recipe
    size = 3 * sum(p.numel() * p.element_size() for p in run.trainer.parameters)  # the adapter and Adam's two moments
    every = math.ceil(recipe.max_train_steps / recipe.checkpointing_steps)
    kept = every if recipe.checkpoints_total_limit is None else min(every, recipe.checkpoints_total_limit)
    needed, free = size * (kept + 1), free_disk(Path(recipe.output_dir))
    figure = f"{needed / 2**20:,.0f} MiB for {kept} + 1 checkpoints, {free / GIB:.1f} GiB free in {recipe.output_dir}"
    if needed <= 0.5 * free:
        return Finding("disk", "PASS", figure)
    remedy = "set checkpoints_total_limit lower, or output_dir on a larger disk"
    return Finding("disk", "WARN" if needed <= free else "FAIL", figure, remedy)


CHECKS = {
    "sampler equals diffusers' own": parity,
    "ratio is 1 on policy": ratio,
    "reward gradient": reward_gradient,
    "adapter at the start": identity,
    "memory": memory,
    "disk": disk,
}
