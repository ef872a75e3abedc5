"""From pixels to latents, for methods that train on images."""

import torch
from torch import Tensor

from diffalign.laws.prediction import at_least_fp32
from diffalign.policies.base import Policy


@torch.no_grad()
def encode_images(policy: Policy, images: Tensor) -> Tensor:
    """Return the final states that decode to images: (B, 3, H, W) in [0, 1] -> (B, C, h, w), fp32 at least.

    The VAE's mode (the mean of its posterior) is taken, so that an image has one latent. Each image is encoded alone
    and without autocast: its latent is the same whatever else is encoded.
    """
    return torch.cat([_encode_one(policy, image) for image in images.split(1)])


def _encode_one(policy: Policy, image: Tensor) -> Tensor:
    vae = policy.pipe.vae
    # `unscale` is a scale and a shift of each channel in every family; two latents tell them.
    zero = torch.zeros(1, policy.latent_channels, 1, 1, device=vae.device, dtype=policy.state_dtype)
    shift = policy.unscale(zero)
    scale = policy.unscale(zero + 1) - shift
    pixels = (image * 2 - 1).to(vae.device, vae.dtype)
    if shift.ndim == 5:  # an autoencoder of videos, which is given one frame
        pixels = pixels.unsqueeze(2)
    with torch.autocast(vae.device.type, enabled=False):
        encoded = vae.encode(pixels)
    # Deterministic autoencoders, such as Sana's, have a latent and no distribution.
    read = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    latent = (at_least_fp32(read).to(policy.state_dtype) - shift) / scale
    return latent.squeeze(2) if shift.ndim == 5 else latent
