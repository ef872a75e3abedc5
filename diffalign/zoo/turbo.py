"""`shapes-turbo`: from noise to a picture in one step, distilled from `shapes-sd3`."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch.nn import functional as F

from diffalign.zoo import pairs, sd3, training

SEED = 81
PICTURES = training.Restarts(
    (
        training.Schedule(steps=600, learning_rate=5e-4, warmup=50, decay=300),
        training.Schedule(steps=480, learning_rate=1e-3, warmup=30, decay=300),
    )
)
ELEMENTS = training.Restarts(
    (
        training.Schedule(steps=200, learning_rate=5e-4, warmup=20, decay=160),
        training.Schedule(steps=140, learning_rate=5e-4, warmup=10, decay=120),
    )
)
BATCH = 32
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Between two batches of latents, a scalar."""

START = 900.0
"""The teacher's timestep that the student starts as. At 1000 a denoiser has no reason to look at its noise; at 900 it
takes pure noise for a faint picture, and says nearly where the flow will put things, in about the right colours."""


def of_pipeline(pipeline: StableDiffusion3Pipeline) -> sd3.Denoiser:
    """The networks of `shapes-sd3` as training sees them, the text encoders frozen."""
    model = sd3.Denoiser()
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(model, name).load_state_dict(getattr(pipeline, name).state_dict())
    model.text_encoder.requires_grad_(False)
    model.text_encoder_2.requires_grad_(False)
    return model


@torch.no_grad()
def shift_clock(model: sd3.Denoiser) -> None:
    """Make timestep 1000 mean what `START` meant."""
    embedder = model.transformer.time_text_embed
    last, first = embedder.timestep_embedder(embedder.time_proj(torch.tensor([1000.0, START])))
    embedder.timestep_embedder.linear_2.bias += first - last


def draw(model: sd3.Denoiser, noise: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scaled latents (B, 4, 16, 16) in one Euler step from `noise`, as the pipeline takes it, without guidance."""
    model.attention.copies = sd3.random_copies(len(ids), generator)
    context, pooled = model.encode(ids)
    return noise - model.transformer(noise, context, pooled, torch.full((len(ids),), 1000.0)).sample


def of_pictures(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber distance of whole pictures, sqrt(d^2 + c^2) - c (Song & Dhariwal 2023, arXiv 2310.14189), mean.

    It pulls at each picture with nearly equal force, however far off, so that those whose layout the student cannot
    guess do not blur the others. Departure: d^2 is a mean over elements, of which theirs is the sum, and c is 0.03,
    where theirs would be 0.00054.
    """
    return ((made - wanted).square().mean((1, 2, 3)) + 0.03**2).sqrt().mean() - 0.03


def train(
    folder: Path, teacher: StableDiffusion3Pipeline, vae: AutoencoderKL
) -> tuple[StableDiffusion3Pipeline, float]:
    """Make the pairs and copy them; returns the pipeline, with averaged weights, and the seconds.

    One-step distillation of InstaFlow (Liu et al. 2023, arXiv 2309.06380), guided flows included. Departures: the flow
    is not straightened first, the student begins at `START`, and latents are compared, first as whole pictures and then
    by elements. The seconds are those of training; the pairs come before, and take about a third as long.
    """
    model = of_pipeline(teacher)
    data = pairs.cached(model, folder / "pairs")
    student = copy.deepcopy(model)
    shift_clock(student)

    def losses(distance: Distance) -> Callable[[training.Batch], dict[str, torch.Tensor]]:
        def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
            noise, wanted, ids = data.draw(batch, BATCH)
            return {"loss": distance(draw(student, noise, ids, batch.generator), wanted)}

        return loss

    seconds = training.train(student, losses(of_pictures), PICTURES, folder / "pictures", seed=SEED)
    # The absolute error's best guess is a median: between two colours it is one of them, where a mean is a third.
    seconds += training.train(student, losses(F.l1_loss), ELEMENTS, folder / "elements", seed=SEED + 1)
    student.eval()
    return student.pipeline(vae), seconds
