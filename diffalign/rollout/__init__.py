"""Sampling a policy: recorded without gradient, or differentiable under a rule that says where the gradient flows."""

from diffalign.rollout.chain import Trajectory
from diffalign.rollout.differentiable import differentiable_rollout
from diffalign.rollout.gradient import DRTune, Full, GradientRule, LastK, Plan, RandomK
from diffalign.rollout.recorded import log_probs, rollout, transition
from diffalign.rollout.two_pass import trajectory_gradient

__all__ = [
    "DRTune",
    "Full",
    "GradientRule",
    "LastK",
    "Plan",
    "RandomK",
    "Trajectory",
    "differentiable_rollout",
    "log_probs",
    "rollout",
    "trajectory_gradient",
    "transition",
]
