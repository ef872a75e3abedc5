"""Latents of images: what the pipeline's own VAE says, in the scale of the chain, in every shape of autoencoder."""

import pytest
import torch

from diffalign.policies import Policy, encode_images
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux, tiny_qwen, tiny_sana


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux, tiny_sana, tiny_qwen])
def test_a_latent_is_the_mode_of_the_vae_in_the_scale_of_the_chain(make):
    policy = Policy.wrap(make())
    vae, factor = policy.pipe.vae, policy.pipe.vae_scale_factor
    images = torch.rand(2, 3, 8 * factor, 8 * factor, generator=torch.Generator().manual_seed(0))
    latents = encode_images(policy, images)
    assert latents.shape == (2, policy.latent_channels, 8, 8)
    assert latents.dtype == torch.float32
    assert torch.equal(encode_images(policy, images[1:]), latents[1:]), "whatever else is encoded"
    frames = images[:1] * 2 - 1
    with torch.no_grad():
        if make is tiny_qwen:
            read = vae.encode(frames[:, :, None]).latent_dist.mode()
        elif make is tiny_sana:
            read = vae.encode(frames).latent
        else:
            read = vae.encode(frames).latent_dist.mean
    torch.testing.assert_close(policy.unscale(latents[:1]), read, rtol=1e-5, atol=1e-6)
    config = vae.config
    if make in (tiny_sd, tiny_sd3, tiny_flux):
        scaled = (read - (config.shift_factor or 0)) * config.scaling_factor
        torch.testing.assert_close(latents[:1], scaled, rtol=1e-5, atol=1e-6)
