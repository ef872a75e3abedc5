"""The maths of one denoising step, in torch only: levels and schedules, predictions, step laws and their Gaussians."""

from diffalign.laws.ddim import DDIM
from diffalign.laws.flow import FlowGRPONoise, FlowODE, FlowSDE
from diffalign.laws.law import Law
from diffalign.laws.normal import Normal, Reduction
from diffalign.laws.prediction import Prediction, PredictionKind
from diffalign.laws.schedule import Level, Schedule, ScheduleKind, diffusion_schedule, flow_schedule

__all__ = [
    "DDIM",
    "FlowGRPONoise",
    "FlowODE",
    "FlowSDE",
    "Law",
    "Level",
    "Normal",
    "Prediction",
    "PredictionKind",
    "Reduction",
    "Schedule",
    "ScheduleKind",
    "default_law",
    "diffusion_schedule",
    "flow_schedule",
]


def default_law(kind: ScheduleKind, noise: float = 0.0) -> Law:
    """Return the usual law of a schedule.

    Args:
        kind: kind of the schedule.
        noise: DDIM's eta for a diffusion schedule; Flow-GRPO's level ``a`` for a flow, where 0 means the plain ODE.
    """
    if kind == "diffusion":
        return DDIM(noise)
    return FlowSDE(FlowGRPONoise(noise)) if noise else FlowODE()
