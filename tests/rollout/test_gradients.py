"""Gradients of every rule against central differences of its own surrogate, in float64 on tiny real models.

The surrogate of a rule freezes what the rule stops: outputs of steps without gradient, and with detached inputs the
states that the network sees, and under a low-variance rule the x_0 that is noised again, at the values recorded with
the unperturbed weights.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffalign.laws import DDIM, FlowODE, FlowSDE, Law, Prediction, Schedule
from diffalign.noise import generator, normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import (
    DRTune,
    Full,
    GradientRule,
    LastK,
    LowVariance,
    Plan,
    RandomK,
    Sparse,
    differentiable_rollout,
    rollout,
)

STEPS = 4
ROWS = [(0, 0)]
GUIDANCE = 2.0


@dataclass
class Problem:
    policy: Policy
    law: Law
    schedule: Schedule

    def arguments(self) -> dict:
        return {"rows": ROWS, "seed": 5, "guidance_scale": GUIDANCE}


@pytest.fixture(params=["sd", "sd3"], scope="module")
def problem(request) -> Problem:
    if request.param == "sd":
        policy, law = Policy.wrap(tiny_sd(torch.float64, prediction_type="v_prediction")), DDIM(0.7)
    else:
        policy, law = Policy.wrap(tiny_sd3(torch.float64)), FlowSDE()
    policy.add_lora(rank=2, alpha=4)
    randomise(policy)
    return Problem(policy, law, policy.schedule(STEPS))


def randomise(policy: Policy) -> None:
    """B starts at 0, where the gradient of A vanishes; here every parameter matters."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


def objective(latents: Tensor) -> Tensor:
    """A smooth reward of the latent with non-trivial curvature."""
    weight = torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).reshape(latents.shape)
    return (weight * latents).sum() + 0.1 * latents.square().sum().sqrt()


def direction(policy: Policy) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in policy.trainable().values()]


def central_difference(policy: Policy, function, size: float = 1e-5) -> float:
    parameters, along = list(policy.trainable().values()), direction(policy)

    @torch.no_grad()
    def at(offset: float) -> float:
        for parameter, d in zip(parameters, along, strict=True):
            parameter.add_(d, alpha=offset)
        value = float(function())
        for parameter, d in zip(parameters, along, strict=True):
            parameter.add_(d, alpha=-offset)
        return value

    return (at(size) - at(-size)) / (2 * size)


def analytic(problem: Problem, plan: Plan, **settings) -> tuple[float, list[Tensor]]:
    policy = problem.policy
    condition = policy.encode(["a bad dog"])
    trajectory = differentiable_rollout(
        policy, condition, problem.law, problem.schedule, plan=plan, **problem.arguments(), **settings
    )
    gradients = torch.autograd.grad(objective(trajectory.latents), list(policy.trainable().values()))
    return sum(float((g * d).sum()) for g, d in zip(gradients, direction(policy), strict=True)), list(gradients)


@torch.no_grad()
def surrogate(problem: Problem, plan: Plan):
    """The rule's surrogate as a function of the weights alone, written out step by step."""
    policy, law, schedule = problem.policy, problem.law, problem.schedule
    condition = policy.encode(["a bad dog"])
    recorded = rollout(policy, condition, law, schedule, record_states=True, **problem.arguments())
    outputs = [
        policy.predict(x, schedule.level(i), condition, GUIDANCE).output for i, x in enumerate(recorded.states[:-1])
    ]

    noisy = renoised(problem, plan, outputs, recorded.states)

    def evaluate() -> Tensor:
        x = recorded.states[0]
        for i in range(STEPS):
            output = outputs[i]
            if i in plan.graded:
                seen = recorded.states[i] if plan.detach_input else x
                output = policy.predict(seen, schedule.level(i), condition, GUIDANCE).output
            prediction = Prediction(output, x, schedule.level(i), policy.prediction_kind())
            if i == plan.stop:
                again = [policy.predict(state, schedule.level(i), condition, GUIDANCE).x0 for state in noisy]
                return objective(torch.cat([prediction.x0, *again]))
            noise = normal((4, 8, 8), seed=5, purpose="step", rows=ROWS, step=i, dtype=torch.float64)
            x = law.step(prediction, schedule.target(i)).sample(noise)
        return objective(x)

    return evaluate


def renoised(problem: Problem, plan: Plan, outputs: list[Tensor], states: list[Tensor]) -> list[Tensor]:
    """The recorded prediction of x_0 at the stop, noised to that level again."""
    if not plan.renoised:
        return []
    level = problem.schedule.level(plan.stop)
    x0 = Prediction(outputs[plan.stop], states[plan.stop], level, problem.policy.prediction_kind()).x0
    draws = [
        normal((4, 8, 8), seed=5, purpose="renoise", rows=ROWS, step=j, dtype=torch.float64)
        for j in range(plan.renoised)
    ]
    return [float(level.alpha) * x0 + float(level.sigma) * noise for noise in draws]


RULES = [
    Full(),
    LastK(1),
    LastK(3),
    RandomK(2, 3),
    DRTune(2, 0.0),
    DRTune(2, 0.5),
    DRTune(1, 0.5),
    Sparse(2),
    LowVariance(2),
    LowVariance(1, skip=2),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_each_rule_is_the_gradient_of_its_own_surrogate(problem: Problem, rule: GradientRule) -> None:
    plan = rule.plan(STEPS, generator(3, "truncation", 0))
    found, _ = analytic(problem, plan)
    expected = central_difference(problem.policy, surrogate(problem, plan))
    assert abs(found - expected) < 1e-6 * abs(expected), (found, expected, plan)


def test_full_is_the_gradient_of_the_true_objective(problem: Problem) -> None:
    policy = problem.policy
    condition = policy.encode(["a bad dog"])

    def truth() -> Tensor:
        trajectory = rollout(policy, condition, problem.law, problem.schedule, **problem.arguments())
        return objective(trajectory.latents)

    found, _ = analytic(problem, Full().plan(STEPS, generator(0, "truncation", 0)))
    expected = central_difference(policy, truth)
    assert abs(found - expected) < 1e-6 * abs(expected), (found, expected)


@pytest.mark.parametrize("problem", ["sd3"], indirect=True)
def test_sparse_is_the_straight_through_surrogate_of_flowbp(problem: Problem) -> None:
    """Velocities recorded, k of them evaluated again, x_0 from all by Euler's sum, put on the sample: written out."""
    problem = replace(problem, law=FlowODE())
    policy, schedule, sigma = problem.policy, problem.schedule, problem.schedule.sigma
    condition, parameters = policy.encode(["a bad dog"]), list(policy.trainable().values())
    recorded = rollout(policy, condition, problem.law, schedule, record_states=True, **problem.arguments())
    steps = [1, 2]
    x0 = recorded.states[0]
    for i, state in enumerate(recorded.states[:-1]):
        velocity = policy.predict(state, schedule.level(i), condition, GUIDANCE).output
        x0 = x0 + (sigma[i + 1] - sigma[i]) * (velocity if i in steps else velocity.detach())
    through = recorded.latents + (x0 - x0.detach())
    expected = torch.autograd.grad(objective(through), parameters)

    plans = [Sparse(2).plan(STEPS, generator(i, "truncation", 0)) for i in range(20)]
    plan = next(plan for plan in plans if list(plan.graded) == steps)
    trajectory = differentiable_rollout(
        policy, condition, problem.law, schedule, plan=plan, checkpoint=False, **problem.arguments()
    )
    assert torch.equal(trajectory.latents, recorded.latents)
    found = torch.autograd.grad(objective(trajectory.latents), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("problem", ["sd3"], indirect=True)
def test_the_last_step_of_sd3_has_next_to_no_gradient_and_can_be_skipped(problem: Problem) -> None:
    def size(rule: GradientRule) -> float:
        _, gradients = analytic(problem, rule.plan(STEPS, generator(0, "truncation", 0)))
        return float(torch.cat([g.flatten() for g in gradients]).norm())

    assert size(LowVariance(2)) < 0.03 * size(LowVariance(2, skip=1))


def test_the_unconditional_branch_can_be_left_out(problem: Problem) -> None:
    """One step from fixed noise: the gradient is guidance_scale times that of the conditional branch alone."""
    policy, plan = problem.policy, Plan((STEPS - 1,))
    condition = policy.encode(["a bad dog"])
    recorded = rollout(policy, condition, problem.law, problem.schedule, record_states=True, **problem.arguments())
    level, to = problem.schedule.level(STEPS - 1), problem.schedule.target(STEPS - 1)
    x = recorded.states[-2]
    with torch.no_grad():
        negative = policy.evaluate(x, level.timestep.float(), policy.unconditional(1))
    noise = normal((4, 8, 8), seed=5, purpose="step", rows=ROWS, step=STEPS - 1, dtype=torch.float64)

    def conditional_only() -> Tensor:
        output = negative + GUIDANCE * (policy.evaluate(x, level.timestep.float(), condition) - negative)
        step = problem.law.step(Prediction(output, x, level, policy.prediction_kind()), to)
        sampled = step.sample(noise) if bool(step.std > 0) else step.mean
        return objective(sampled)

    found, _ = analytic(problem, plan, guidance="detach_unconditional")
    both, _ = analytic(problem, plan)
    expected = central_difference(policy, conditional_only)
    assert abs(found - expected) < 1e-6 * abs(expected)
    assert abs(both - expected) > 1e-3 * abs(expected)


def test_checkpointing_changes_no_gradient(problem: Problem) -> None:
    for plan in (Plan((1, 3)), Plan((0, 2), detach_input=True, stop=3), Plan((2,), stop=2, renoised=2)):
        _, stored = analytic(problem, plan, checkpoint=False)
        _, repeated = analytic(problem, plan, checkpoint=True)
        assert all(torch.equal(a, b) for a, b in zip(stored, repeated, strict=True))


def test_distances_to_the_reference_and_their_gradients(problem: Problem) -> None:
    """prediction_mse and kl of one graded last step, against the formulas evaluated apart and central differences."""
    policy, law, schedule = problem.policy, problem.law, problem.schedule
    condition, last = policy.encode(["a bad dog"]), STEPS - 2
    plan = Plan((last,))
    recorded = rollout(policy, condition, law, schedule, record_states=True, **problem.arguments())
    x, level, to = recorded.states[last], schedule.level(last), schedule.target(last)
    with torch.no_grad(), policy.reference():
        anchor = policy.predict(x, level, condition, GUIDANCE)

    def distances() -> tuple[Tensor, Tensor]:
        now = policy.predict(x, level, condition, GUIDANCE)
        mse = (now.output - anchor.output).square().mean()
        mine, other = law.step(now, to), law.step(anchor, to)
        return mse, ((mine.mean - other.mean) ** 2).sum() / (2 * mine.std[0] ** 2)

    trajectory = differentiable_rollout(
        policy, condition, law, schedule, plan=plan, reference=True, **problem.arguments()
    )
    with torch.no_grad():
        mse, kl = distances()
    torch.testing.assert_close(trajectory.prediction_mse, mse[None], rtol=1e-10, atol=0)
    torch.testing.assert_close(trajectory.kl, kl[None], rtol=1e-10, atol=0)
    parameters = list(policy.trainable().values())
    for index, value in enumerate((trajectory.prediction_mse, trajectory.kl)):
        gradients = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction(policy), strict=True))
        expected = central_difference(policy, lambda index=index: distances()[index])
        assert abs(found - expected) < 1e-5 * abs(expected)


@torch.no_grad()
def test_the_distance_is_a_mean_over_renoised_predictions_too(problem: Problem) -> None:
    policy, law, schedule, plan = problem.policy, problem.law, problem.schedule, Plan((2,), stop=2, renoised=2)
    condition, level = policy.encode(["a bad dog"]), schedule.level(2)
    states = rollout(policy, condition, law, schedule, record_states=True, **problem.arguments()).states
    outputs = [policy.predict(x, schedule.level(i), condition, GUIDANCE).output for i, x in enumerate(states[:3])]
    squares = []
    for x in [states[2], *renoised(problem, plan, outputs, states)]:
        now = policy.predict(x, level, condition, GUIDANCE).output
        with policy.reference():
            squares.append((now - policy.predict(x, level, condition, GUIDANCE).output).square().mean())
    with torch.enable_grad():
        trajectory = differentiable_rollout(
            policy, condition, law, schedule, plan=plan, reference=True, **problem.arguments()
        )
    torch.testing.assert_close(trajectory.prediction_mse, torch.stack(squares).mean()[None], rtol=1e-10, atol=0)
    assert trajectory.kl is None
