"""The maths of one denoising step, in torch only: levels and schedules, predictions, step laws and their densities.

Law, its noise, whether it keeps the marginals and whether it is memoryless (:class:`Law` says what that means; both
are measured in tests/laws/test_properties.py):

| law | schedule | marginal_preserving | memoryless |
| --- | --- | --- | --- |
| ``DDIM(eta)`` | both; on a flow it is the Euler step (eta = 0) to the ancestral step (eta = 1) | yes | eta = 1 |
| ``DDPM(variance)`` | both | yes | yes |
| ``FlowODE()`` | flow | yes | no |
| ``FlowSDE(FlowGRPONoise(a))`` | flow | yes | a >= sqrt(2) |
| ``FlowSDE(DanceGRPONoise(eta))`` | flow | yes | no |
| ``CPS(eta)`` | both | only eta = 0 | eta > 0 |
| ``Consistency()`` | both | no | yes |
| ``Window(law, schedule, start, stop)`` | that schedule's | as the law | no |
| ``MaskedDiffusion(mask_id)`` | tokens | yes | yes |
"""

from diffalign.laws.ddim import DDIM
from diffalign.laws.ddpm import DDPM
from diffalign.laws.default import default_law
from diffalign.laws.flow import DanceGRPONoise, FlowGRPONoise, FlowODE, FlowSDE
from diffalign.laws.law import Law
from diffalign.laws.masked import Categorical, MaskedDiffusion
from diffalign.laws.normal import Normal, Reduction
from diffalign.laws.prediction import Prediction, PredictionKind
from diffalign.laws.renoise import CPS, Consistency
from diffalign.laws.schedule import Level, Schedule, ScheduleKind, diffusion_schedule, flow_schedule
from diffalign.laws.window import Window

__all__ = [
    "CPS",
    "DDIM",
    "DDPM",
    "Categorical",
    "Consistency",
    "DanceGRPONoise",
    "FlowGRPONoise",
    "FlowODE",
    "FlowSDE",
    "Law",
    "Level",
    "MaskedDiffusion",
    "Normal",
    "Prediction",
    "PredictionKind",
    "Reduction",
    "Schedule",
    "ScheduleKind",
    "Window",
    "default_law",
    "diffusion_schedule",
    "flow_schedule",
]
