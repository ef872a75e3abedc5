"""Rollouts that the gradient of a reward flows back through."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from diffalign.laws import Law, Prediction, Schedule
from diffalign.ledger import Ledger
from diffalign.noise import Address
from diffalign.policies import Condition, Guidance, Policy
from diffalign.rollout.chain import Chain, Trajectory, check_rows, check_trainable
from diffalign.rollout.gradient import Plan
from diffalign.rollout.guidance import GuidanceScale


def differentiable_rollout(
    policy: Policy,
    condition: Condition,
    law: Law,
    schedule: Schedule,
    *,
    rows: Sequence[Address],
    seed: int,
    guidance_scale: GuidanceScale,
    plan: Plan,
    guidance: Guidance = "pipeline",
    checkpoint: bool = True,
    reference: bool = False,
    height: int | None = None,
    width: int | None = None,
) -> Trajectory:
    """Sample with a graph from the policy's parameters to the result, where the plan says so.

    Steps outside the plan build no graph and are not checkpointed. Under DRTune's plan an evaluation without graph
    between two that have one leaves the sampler's own path from state to state differentiable; that path is linear, so
    that it holds no activations, however many the steps.

    Args:
        policy: the policy.
        condition: encoded prompts, one for each row.
        law: the law of a step; its noise is a constant of the gradient.
        schedule: the levels.
        rows: noise address of each row.
        seed: the run's seed.
        guidance_scale: weight of classifier-free guidance; of all steps, or of each.
        plan: where the gradient flows, from a :class:`GradientRule`.
        guidance: "detach_unconditional" leaves the unconditional branch without graph.
        checkpoint: store only the state of each step with gradient and evaluate it again in the backward pass.
        reference: measure the distance to the policy with its adapter off, at the same states.
        height: of the images in pixels, default as the pipeline's.
        width: likewise.

    Raises:
        ValueError: gradients are disabled, nothing is trainable, or rows and conditions differ in number.
    """
    check_trainable(policy)
    check_rows(rows, condition)
    chain = Chain.of(policy, condition, law, schedule, rows, seed, guidance_scale, (height, width))
    return _sample(chain, plan, guidance, checkpoint, reference)


def _sample(chain: Chain, plan: Plan, guidance: Guidance, checkpoint: bool, reference: bool) -> Trajectory:
    x = chain.initial()
    result = Trajectory(x, torch.tensor(chain.stochastic), plan=plan)
    squares, divergences = [], []
    last = len(chain.stochastic) - 1 if plan.stop is None else plan.stop
    for i in range(last + 1):
        prediction = _predict_planned(chain, i, x, plan, guidance, checkpoint)
        step = None if i == plan.stop else chain.transition(i, prediction)
        if reference and i in plan.graded:
            anchor = _reference(chain, i, x)
            squares.append(prediction.square_distance(anchor))
            if step is not None and chain.stochastic[i]:
                divergences.append(step.kl(chain.transition(i, anchor), "sum", validate=False))
        x = prediction.x0 if step is None else chain.next(i, step)
    results = [x]
    for draw in range(plan.renoised):
        state = chain.renoise(last, x.detach(), draw)
        prediction = _predict_planned(chain, last, state, plan, guidance, checkpoint)
        if reference:
            squares.append(prediction.square_distance(_reference(chain, last, state)))
        results.append(prediction.x0)
    result.latents = torch.cat(results)
    result.prediction_mse = torch.stack(squares).mean(0) if squares else None
    result.kl = torch.stack(divergences).sum(0) if divergences else None
    result.ledger = _cost(chain, plan, last, guidance, reference)
    return result


def _cost(chain: Chain, plan: Plan, last: int, guidance: Guidance, reference: bool) -> Ledger:
    """Cost of the steps up to `last` and of the renoised ones; a detached unconditional branch has no backward pass."""
    again = [last] * plan.renoised
    graded = [*plan.graded, *again]
    evaluated = [*range(last + 1), *again, *(graded if reference else [])]
    backward = len(chain.rows) * len(graded) if guidance == "detach_unconditional" else chain.evaluations(graded)
    return Ledger(denoiser_evaluations=chain.evaluations(evaluated), backward_passes=backward)


def _predict_planned(chain: Chain, i: int, x: Tensor, plan: Plan, guidance: Guidance, checkpoint: bool) -> Prediction:
    """Predict at a state that keeps its graph; the evaluation has one only where the plan says so."""

    def output(state: Tensor) -> Tensor:
        return chain.predict(i, state, guidance).output

    if i not in plan.graded:
        with torch.no_grad():
            evaluated = output(x)
    else:
        state = x.detach() if plan.detach_input else x
        # Nothing in an evaluation is random, so no random state need be kept for its repetition.
        evaluated = (
            recompute(output, state, use_reentrant=False, preserve_rng_state=False) if checkpoint else output(state)
        )
    return Prediction(evaluated, x, chain.level(i), chain.policy.prediction_kind())


def _reference(chain: Chain, i: int, x: Tensor) -> Prediction:
    """The reference's prediction, a constant, at the same state, which keeps its graph so that it cancels in a KL."""
    with torch.no_grad(), chain.policy.reference():
        evaluated = chain.predict(i, x).output
    return Prediction(evaluated, x, chain.level(i), chain.policy.prediction_kind())
