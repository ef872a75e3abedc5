"""The weight of classifier-free guidance at each step of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.policies import Policy

GuidanceScale = float | Sequence[float]
"""One weight for all steps, or one for each; 1 or less means no guidance, and no unconditional evaluation."""


def in_interval(guidance_scale: float, num_steps: int, interval: Sequence[float] = (0.0, 1.0)) -> GuidanceScale:
    """Guidance in an interval of the steps only (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Departure from the paper, whose interval is one of noise levels: this one is a share of the steps, as that of
    diffusers' guiders (``start``, ``stop``), so that it means the same with any number of steps.

    Args:
        guidance_scale: inside the interval; outside it is 1.
        num_steps: of the rollout.
        interval: from which share of the steps, counted from the noise, up to which, that step excluded.

    Raises:
        ValueError: the interval holds no step.
    """
    start, stop = (int(share * num_steps) for share in interval)
    if start >= stop:
        raise ValueError(f"guidance_interval {list(interval)} holds none of {num_steps} steps: widen it")
    if stop - start == num_steps:
        return guidance_scale
    return [guidance_scale if start <= i < stop else 1.0 for i in range(num_steps)]


def scale_at(guidance_scale: GuidanceScale, step: int) -> float:
    """The weight at one step."""
    return guidance_scale[step] if isinstance(guidance_scale, Sequence) else guidance_scale


def check_scale(guidance_scale: GuidanceScale, num_steps: int, policy: Policy) -> None:
    """Raise ValueError for weights of another number of steps, or for a denoiser that was distilled for one weight."""
    if not isinstance(guidance_scale, Sequence):
        return
    if len(guidance_scale) != num_steps:
        raise ValueError(f"{len(guidance_scale)} guidance scales for {num_steps} steps: give one for each")
    if policy.evaluations_per_prediction(2.0) == 1 and len(set(guidance_scale)) > 1:
        raise ValueError(
            f"{type(policy.pipe).__name__} reads or ignores its guidance scale and evaluates no unconditional branch: "
            "leave out guidance_interval"
        )
