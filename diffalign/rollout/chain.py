"""What a rollout runs on, and what it records."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffalign.laws import Law, Level, Normal, Prediction, Schedule
from diffalign.laws.prediction import noised
from diffalign.ledger import Ledger
from diffalign.noise import Address, normal
from diffalign.policies import Condition, Guidance, Policy
from diffalign.rollout.gradient import Plan
from diffalign.rollout.guidance import GuidanceScale, check_scale, scale_at


@dataclass
class Trajectory:
    """What a rollout of B rows and N steps recorded.

    Attributes:
        latents: (B, C, h, w) the result, before decoding. Under a plan that is renoised n times, ((n + 1) B, C, h, w):
            all rows of the first prediction, then all of the next.
        stochastic: (N,) bool on the host; steps that have a density.
        states: N + 1 states (B, C, h, w) in fp32, the first is the noise, or None if not asked for; None in the places
            of those that branches share.
        log_probs: (B, N) log-density of each step's state, 0 at deterministic steps, or None if not asked for.
        transitions: N Gaussians that the states were drawn from, or None if not asked for, likewise.
        plan: where the gradient flows; None for a rollout without gradient.
        prediction_mse: (B,) mean over the evaluations with gradient, and over elements, of the squared difference
            between the predictions of policy and reference (the penalty of DRaFT+), or None.
        kl: (B,) KL to the reference in nats, summed over the stochastic steps with gradient, or None.
        ledger: denoiser evaluations and the backward passes that one ``backward()`` takes; checkpointed evaluations
            that are computed again are not counted twice.
    """

    latents: Tensor
    stochastic: Tensor
    states: list[Tensor | None] | None = None
    log_probs: Tensor | None = None
    transitions: list[Normal | None] | None = None
    plan: Plan | None = None
    prediction_mse: Tensor | None = None
    kl: Tensor | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def rows(self, index: slice | Tensor) -> "Trajectory":
        """What was recorded of some rows of a rollout without gradient; their cost stays with the whole."""
        part = Trajectory(self.latents[index], self.stochastic)
        part.states = None if self.states is None else [None if x is None else x[index] for x in self.states]
        part.log_probs = None if self.log_probs is None else self.log_probs[index]
        if self.transitions is not None:
            part.transitions = [None if n is None else n.rows(index) for n in self.transitions]
        return part

    def clear_(self, rows: Tensor) -> None:
        """Set the latents, states and means of some rows (B,) bool to 0, in place."""
        means = [normal.mean for normal in self.transitions or [] if normal is not None]
        for tensor in [self.latents, *(state for state in self.states or [] if state is not None), *means]:
            tensor[rows.to(tensor.device)] = 0


@dataclass
class Chain:
    """The parts of a rollout that do not change from step to step. Tables go to the device once, before the loop."""

    policy: Policy
    law: Law
    condition: Condition
    rows: Sequence[Address]
    seed: int
    levels: Level
    targets: Level
    stochastic: list[bool]
    shape: tuple[int, int, int]
    guidance_scale: GuidanceScale

    @classmethod
    def of(
        cls,
        policy: Policy,
        condition: Condition,
        law: Law,
        schedule: Schedule,
        rows: Sequence[Address],
        seed: int,
        guidance_scale: GuidanceScale,
        size: tuple[int | None, int | None],
    ) -> "Chain":
        """Prepare the chain of a batch; ValueError for guidance that the policy or the number of steps has not."""
        check_scale(guidance_scale, len(schedule), policy)
        steps = torch.arange(len(schedule))
        return cls(
            policy=policy,
            law=law,
            condition=condition,
            rows=rows,
            seed=seed,
            levels=schedule.level(steps, policy.device),
            targets=schedule.target(steps, policy.device),
            stochastic=(law.stds(schedule) > 0).tolist(),
            shape=policy.latent_shape(*size),
            guidance_scale=guidance_scale,
        )

    def draw(self, purpose: str, step: int = 0) -> Tensor:
        """Draw addressed noise of the state's shape, (B, C, h, w)."""
        policy = self.policy
        where = {"device": policy.device, "dtype": policy.state_dtype}
        return normal(self.shape, seed=self.seed, purpose=purpose, rows=self.rows, step=step, **where)

    def initial(self) -> Tensor:
        """Return the first state, (B, C, h, w)."""
        return self.policy.initial_latents(self.draw("initial"))

    def level(self, i: int) -> Level:
        """Return the level of evaluation i for every row."""
        return self.levels.rows(slice(i, i + 1)).expand(len(self.rows))

    def predict(self, i: int, x: Tensor, guidance: Guidance = "pipeline") -> Prediction:
        """Evaluate the policy at a state of step i."""
        scale = scale_at(self.guidance_scale, i)
        return self.policy.predict(x, self.level(i), self.condition, scale, guidance)

    def transition(self, i: int, prediction: Prediction) -> Normal:
        """Return the Gaussian of the state after step i."""
        return self.law.step(prediction, self.targets.rows(slice(i, i + 1)).expand(len(self.rows)))

    def next(self, i: int, transition: Normal) -> Tensor:
        """Draw the state after step i with its addressed noise."""
        return transition.sample(self.draw("step", i)) if self.stochastic[i] else transition.mean

    def renoise(self, i: int, x0: Tensor, draw: int) -> Tensor:
        """Noise a clean latent to the level of evaluation i, with the noise of that draw."""
        return noised(x0, self.draw("renoise", draw), self.levels.rows(slice(i, i + 1)))

    def evaluations(self, steps: Iterable[int]) -> int:
        """Return the denoiser evaluations of all rows at these steps."""
        branches = (self.policy.evaluations_per_prediction(scale_at(self.guidance_scale, i)) for i in steps)
        return len(self.rows) * sum(branches)


def check_trainable(policy: Policy) -> None:
    """Raise ValueError unless there is something to differentiate."""
    if not torch.is_grad_enabled() or not policy.trainable():
        reason = "the policy has no trainable parameter" if torch.is_grad_enabled() else "gradients are disabled"
        raise ValueError(f"nothing to differentiate, {reason}: call policy.add_lora(...) and leave torch.no_grad()")


def check_rows(rows: Sequence[Address], condition: Condition) -> None:
    """Raise ValueError unless each condition has its noise address."""
    if len(rows) != len(condition):
        raise ValueError(f"{len(rows)} noise addresses for {len(condition)} conditions: give one for each row")
