"""Reading diffusers' schedulers for their tables. A scheduler object is never stepped, and never changed."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

from diffalign.laws import Schedule, diffusion_schedule, flow_schedule

logger = logging.getLogger(__name__)

LCM_SKIP = 1e-5
"""Share of the state in x_0, by LCM's boundary condition, from which on it may not be left out."""


def check_diffusion(scheduler: Any) -> None:
    """Say in the log how a diffusion scheduler is read, if not as itself.

    Raises:
        ValueError: as :func:`as_diffusion`.
    """
    read, name = type(as_diffusion(scheduler)).__name__, type(scheduler).__name__
    if name != read:
        logger.info("%s is read as %s over the same betas; policies step by DDIM", name, read)


def as_diffusion(scheduler: Any) -> Any:
    """Return a private LCMScheduler for an LCMScheduler, and a private DDIMScheduler for any other, as :func:`as_ddim`.

    Raises:
        ValueError: what the scheduler does cannot be read from its tables.
    """
    from diffusers import LCMScheduler

    if not isinstance(scheduler, LCMScheduler):
        return as_ddim(scheduler)
    _refuse(scheduler.config, {"clip_sample": True, "thresholding": True}, "it changes the prediction of x_0")
    return copy.deepcopy(scheduler)


def as_ddim(scheduler: Any) -> Any:
    """Return a private DDIMScheduler over the betas of any diffusion scheduler.

    A scheduler of another class (PNDM, DPM-Solver, Euler, ...) is read as ``DDIMScheduler.from_config`` of its config.
    If that config says nothing about clipping, it does not clip, whatever DDIM's default.

    Raises:
        ValueError: what the scheduler does cannot be read from its tables.
    """
    from diffusers import DDIMScheduler

    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, DDIMScheduler):
        ddim = copy.deepcopy(scheduler)
    elif "beta_schedule" in config and any(c.__name__ == "DDIMScheduler" for c in scheduler.compatibles):
        ddim = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    else:
        raise ValueError(
            f"scheduler {name} is not a diffusion scheduler over betas: "
            "set pipe.scheduler to a DDIMScheduler with the betas that the model was trained with"
        )
    _refuse(ddim.config, {"clip_sample": True, "thresholding": True}, "it changes the prediction of x_0")
    kinds = ("epsilon", "v_prediction", "sample")
    if ddim.config.prediction_type not in kinds:
        raise ValueError(f"prediction_type {ddim.config.prediction_type!r} of {name} is unknown: use one of {kinds}")
    return ddim


def read_diffusion(scheduler: Any, num_inference_steps: int) -> Schedule:
    """Return the schedule of a diffusion scheduler at a number of steps.

    The chains of few-step models, LCM's and those of Euler over trailing timesteps (SD-Turbo, SDXL-Turbo), lead from
    each timestep to the next and end at x_0. Others have DDIM's stride and end where ``set_alpha_to_one`` says.

    Raises:
        ValueError: as :func:`as_diffusion`, or the network predicts noise where the table holds no signal.
    """
    from diffusers import LCMScheduler

    table = as_diffusion(scheduler)
    table.set_timesteps(num_inference_steps)
    if isinstance(table, LCMScheduler):
        _refuse_boundary(table)
    euler = type(scheduler).__name__.startswith("Euler") and scheduler.config.timestep_spacing == "trailing"
    if euler or isinstance(table, LCMScheduler):
        schedule = diffusion_schedule(table.alphas_cumprod, table.timesteps, None, 1.0)
    else:
        stride = table.config.num_train_timesteps // num_inference_steps
        schedule = diffusion_schedule(table.alphas_cumprod, table.timesteps, stride, table.final_alpha_cumprod)
    if table.config.prediction_type == "epsilon" and (schedule.alpha[:-1] == 0).any():
        raise ValueError(
            "epsilon prediction has no x_0 at zero terminal SNR (rescale_betas_zero_snr=True): "
            "use a model with v_prediction, or rescale_betas_zero_snr=False"
        )
    return schedule


def _refuse_boundary(lcm: Any) -> None:
    """Refuse timesteps at which LCM's boundary condition changes x_0."""
    lowest = int(lcm.timesteps.min())
    skip, _ = lcm.get_scalings_for_boundary_condition_discrete(lowest)
    if skip > LCM_SKIP:
        raise ValueError(
            f"at timestep {lowest} LCM's boundary condition (timestep_scaling={lcm.config.timestep_scaling}) mixes "
            f"{skip:.1g} of the state into x_0: take fewer than {len(lcm.timesteps)} steps"
        )


def as_flow_euler(scheduler: Any) -> Any:
    """Return a private FlowMatchEulerDiscreteScheduler.

    A multistep solver over flow sigmas (DPM-Solver or UniPC with ``use_flow_sigmas``, as Sana ships) is read as Euler
    with its shift.

    Raises:
        ValueError: the scheduler is of another class, or does what its tables do not tell.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.flow_shift)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not read: set pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    _refuse(scheduler.config, {"stochastic_sampling": True}, "it adds noise of its own; ask for FlowSDE instead")
    _refuse(scheduler.config, {"invert_sigmas": True}, "its sigmas grow")
    return copy.deepcopy(scheduler)


def read_flow(
    scheduler: Any, num_inference_steps: int, mu: float | None, sigmas: Sequence[float] | None = None
) -> Schedule:
    """Return the schedule of a flow scheduler at a number of steps.

    Args:
        scheduler: the pipeline's scheduler.
        num_inference_steps: number of steps.
        mu: the shift that the pipeline computes from the image size where the scheduler shifts dynamically, else None.
        sigmas: noise levels before the shift, where the pipeline gives them; default the scheduler's own.

    Raises:
        ValueError: as :func:`as_flow_euler`, or the scheduler's tables are not defined for one step.
    """
    euler = as_flow_euler(scheduler)
    if num_inference_steps == 1 and euler.config.shift_terminal:
        raise ValueError(
            f"one step cannot end its sigmas at shift_terminal={euler.config.shift_terminal} and begin them at 1: "
            "use 2 steps or more"
        )
    settings = {key: value for key, value in (("mu", mu), ("sigmas", sigmas)) if value is not None}
    euler.set_timesteps(num_inference_steps, **settings)
    return flow_schedule(euler.sigmas, euler.timesteps)


def _refuse(config: Any, settings: dict[str, Any], why: str) -> None:
    for key, value in settings.items():
        if config.get(key) == value:
            raise ValueError(
                f"scheduler setting {key}={value} cannot be read from a table ({why}): "
                f"set pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {key}=False)"
            )
