"""Sampling a policy: recorded without gradient, or differentiable under a rule that says where the gradient flows."""

from diffalign.rollout.branched import branched_rollout
from diffalign.rollout.chain import Trajectory
from diffalign.rollout.differentiable import differentiable_rollout
from diffalign.rollout.gradient import DRTune, Full, GradientRule, LastK, LowVariance, Plan, RandomK, Sparse
from diffalign.rollout.guidance import GuidanceScale, in_interval
from diffalign.rollout.recorded import log_probs, rollout, transition
from diffalign.rollout.two_pass import trajectory_gradient

__all__ = [
    "DRTune",
    "Full",
    "GradientRule",
    "GuidanceScale",
    "LastK",
    "LowVariance",
    "Plan",
    "RandomK",
    "Sparse",
    "Trajectory",
    "branched_rollout",
    "differentiable_rollout",
    "in_interval",
    "log_probs",
    "rollout",
    "trajectory_gradient",
    "transition",
]
