"""Train either denoiser on the cached latents, and write it as a pipeline that plain diffusers loads."""

import copy
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffalign.zoo import latents, sd, sd3, training

FAMILIES: dict[str, ModuleType] = {"shapes-sd": sd, "shapes-sd3": sd3}
LATENT_SEED = 41


def train(name: str, folder: Path, vae: AutoencoderKL, export_every: int = 250) -> tuple[DiffusionPipeline, float]:
    """Train `name`; returns its pipeline, with averaged weights, and the seconds.

    Every `export_every` steps the pipeline so far is written to `folder/pipeline`, to look at, and once to
    `folder/unfinished`, for `shapes-preference`.
    """
    family = FAMILIES[name]
    vae = copy.deepcopy(vae)
    if not family.SHIFTED:
        vae.register_to_config(shift_factor=None)
    model = family.Denoiser()
    data = latents.cached(vae, model.tokenizer, LATENT_SEED, folder.parent / "latents.safetensors")

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        clean, ids = data.draw(batch, family.BATCH)
        return model(scaled(vae, clean), ids, batch)

    def export(step: int) -> None:
        model.eval()
        model.pipeline(vae).save_pretrained(folder / "pipeline")
        if step == family.UNFINISHED:
            model.pipeline(vae).save_pretrained(folder / "unfinished")
        model.train()

    seconds = model.learn_to_read(folder / "reading")
    model.train()
    seconds += training.train(
        model, loss, family.SCHEDULE, folder, seed=family.SEED, checkpoint_every=export_every, on_checkpoint=export
    )
    model.eval()
    return model.pipeline(vae), seconds


def scaled(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What the denoiser sees: shifted where the family shifts, and of unit spread."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
