"""`shapes-vae`: the autoencoder that both pipelines share, 64x64x3 pixels to 16x16x4 latents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffalign.zoo import training
from diffalign.zoo.render import render
from diffalign.zoo.world import Scene, sample_scene

SEED = 11
SCHEDULE = training.Schedule(steps=680, learning_rate=2e-3, warmup=30, decay=480)
POLISH = training.Schedule(steps=300, learning_rate=1.5e-3, warmup=20, decay=220)
OFF = 0.15  # largest error of a latent that the decoder learns to bear, in standard deviations


def build() -> AutoencoderKL:
    """An untrained autoencoder; 0.8 M parameters."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def sample_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of the train split."""
    return [sample_scene(rng, "train") for _ in range(count)]


def train(folder: Path) -> tuple[AutoencoderKL, float]:
    """Both stages; returns the autoencoder with its measured scaling, and the seconds."""
    vae = build().to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    seconds = _together(vae, folder)
    mean, std = measure(vae.eval())
    vae.register_to_config(scaling_factor=1 / std)
    vae.register_to_config(shift_factor=mean)
    return vae, seconds + _polish(vae, folder / "polish")


def _together(vae: AutoencoderKL, folder: Path) -> float:
    """Encoder and decoder: L1 + MSE and a tiny KL on fresh renders."""

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        pixels = _pixels(batch)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(batch.generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1, mse = (decoded - pixels).abs().mean(), (decoded - pixels).square().mean()
        return {"loss": l1 + 2 * mse + 1e-4 * kl, "l1": l1, "mse": mse, "kl": kl}

    return training.train(vae, loss, SCHEDULE, folder, seed=SEED, ema_decay=0.99, weight_decay=0.0)


def _polish(vae: AutoencoderKL, folder: Path) -> float:
    """The decoder alone, on latents a little off, as a denoiser's are; latents and scaling stay what they were."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        pixels = _pixels(batch)
        latents = vae.encode(pixels).latent_dist.mean
        amount = OFF / vae.config.scaling_factor * torch.rand(len(latents), 1, 1, 1, generator=batch.generator)
        decoded = vae.decode(latents + amount * torch.randn(latents.shape, generator=batch.generator)).sample
        l1, mse = (decoded - pixels).abs().mean(), (decoded - pixels).square().mean()
        return {"loss": l1 + 2 * mse, "l1": l1, "mse": mse}

    seconds = training.train(vae, loss, POLISH, folder, seed=SEED + 1, ema_decay=0.98, weight_decay=0.0)
    vae.requires_grad_(True)
    return seconds


def _pixels(batch: training.Batch) -> torch.Tensor:
    pixels = render(sample_scenes(16, batch.rng), batch.rng) * 2 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measure(vae: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of the latents of 512 train scenes, over all channels."""
    rng = np.random.default_rng([SEED, 1 << 30])
    latents = encode(vae, render(sample_scenes(512, rng), rng))
    return round(latents.mean().item(), 6), round(latents.std().item(), 6)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """Unscaled latent means (N, 4, 16, 16) of images (N, 3, 64, 64) in [0, 1]."""
    return torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in torch.split(images, 64)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] of unscaled latents."""
    return torch.cat([vae.decode(chunk).sample / 2 + 0.5 for chunk in torch.split(latents, 64)]).clamp(0, 1)
