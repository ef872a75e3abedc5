"""The forward process, for methods that learn from finished images: levels, noised states, denoising errors.

    x_t = alpha_t x_0 + sigma_t noise,     error = mean over the d elements of a latent of (f(x_t, t, c) - target)^2

The target is what the pipeline's network says of x_t: the noise, v = alpha noise - sigma x_0, x_0 or the velocity
noise - x_0. The error is in these units, and the mean over elements makes it independent of the image's size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.laws import Level, Prediction
from diffalign.laws.prediction import at_least_fp32, per_row
from diffalign.policies import Policy


def training_level(policy: Policy, u: Tensor) -> Level:
    """The level at the share `u` of the training levels, from clean to noise.

    A diffusion has the `num_train_timesteps` levels of its scheduler, each as likely as the others for a uniform u. A
    flow has every time t = u, without the scheduler's shift, which is the sampler's.

    Args:
        policy: the pipeline.
        u: (B,) in [0, 1), on the host.
    """
    scheduler, u = policy.pipe.scheduler, u.double()
    steps = scheduler.config.num_train_timesteps
    if policy.prediction_kind() == "velocity":
        alpha, sigma, timestep = 1 - u, u, steps * u
    else:
        at = (u * steps).long()
        signal = scheduler.alphas_cumprod.detach().cpu().double()[at]
        alpha, sigma, timestep = signal.sqrt(), (1 - signal).sqrt(), at.double()
    where = {"device": policy.device, "dtype": torch.float32 if policy.device.type == "mps" else torch.float64}
    return Level(*(tensor.to(**where) for tensor in (alpha, sigma, timestep)))


def denoising_error(prediction: Prediction, latents: Tensor, noise: Tensor) -> Tensor:
    """(B,) mean over elements of the squared difference of a prediction and what it should have been.

    Args:
        prediction: of the noised latents.
        latents: (B, C, h, w) the clean ones, x_0.
        noise: (B, C, h, w) the noise in them.
    """
    level, kind = prediction.level, prediction.kind
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = per_row(level.alpha, noise) * noise - per_row(level.sigma, latents) * latents
    else:
        target = latents if kind == "sample" else noise - latents
    return (at_least_fp32(prediction.output) - target).square().flatten(1).mean(1)


def errors_beside_reference(
    policy: Policy, predict: Callable[[], Prediction], latents: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a preference loss is made of: denoising errors of the policy and of its reference, the adapter off.

    Args:
        policy: whose adapter is switched.
        predict: evaluates it on the noised latents; called twice.
        latents: as of `denoising_error`, like the noise.
        noise: likewise.

    Returns:
        (B,) each: the policy's error with its graph, the reference's, and the square distance of the two predictions.
    """
    with torch.no_grad(), policy.reference():
        reference = predict()
        before = denoising_error(reference, latents, noise)
    prediction = predict()
    return denoising_error(prediction, latents, noise), before, prediction.square_distance(reference)
