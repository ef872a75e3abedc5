"""Reading diffusers' schedulers for their tables. A scheduler object is never stepped, and never changed."""

import copy
from typing import Any

from diffalign.laws import Schedule, diffusion_schedule, flow_schedule


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

    Raises:
        ValueError: as :func:`as_ddim`, or the network predicts noise where the table holds no signal.
    """
    ddim = as_ddim(scheduler)
    ddim.set_timesteps(num_inference_steps)
    stride = ddim.config.num_train_timesteps // num_inference_steps
    schedule = diffusion_schedule(ddim.alphas_cumprod, ddim.timesteps, stride, ddim.final_alpha_cumprod)
    if ddim.config.prediction_type == "epsilon" and (schedule.alpha[:-1] == 0).any():
        raise ValueError(
            "epsilon prediction has no x_0 at zero terminal SNR (rescale_betas_zero_snr=True): "
            "use a model with v_prediction, or rescale_betas_zero_snr=False"
        )
    return schedule


def as_flow_euler(scheduler: Any) -> Any:
    """Return a private copy of a FlowMatchEulerDiscreteScheduler.

    Raises:
        ValueError: the scheduler is of another class, or does what its tables do not tell.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not read: set pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    _refuse(scheduler.config, {"stochastic_sampling": True}, "it adds noise of its own; ask for FlowSDE instead")
    _refuse(scheduler.config, {"invert_sigmas": True}, "its sigmas grow")
    return copy.deepcopy(scheduler)


def read_flow(scheduler: Any, num_inference_steps: int, mu: float | None) -> Schedule:
    """Return the schedule of a flow scheduler at a number of steps.

    Args:
        scheduler: the pipeline's scheduler.
        num_inference_steps: number of steps.
        mu: the shift that the pipeline computes from the image size where the scheduler shifts dynamically, else None.

    Raises:
        ValueError: as :func:`as_flow_euler`.
    """
    euler = as_flow_euler(scheduler)
    euler.set_timesteps(num_inference_steps, **({} if mu is None else {"mu": mu}))
    return flow_schedule(euler.sigmas, euler.timesteps)


def _refuse(config: Any, settings: dict[str, Any], why: str) -> None:
    for key, value in settings.items():
        if config.get(key) == value:
            raise ValueError(
                f"scheduler setting {key}={value} cannot be read from a table ({why}): "
                f"set pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {key}=False)"
            )
