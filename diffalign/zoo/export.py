"""Write trained models as the libraries read them: small, without pickle, without arguments."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffalign.zoo import open_clip_export
from diffalign.zoo.render import RESOLUTION
from diffalign.zoo.text import clip_tokenizer


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Round weights to what half precision can hold, in place; files and figures then agree exactly."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Denoiser and decoder in half precision (diffusers reads them as fp32), text encoders in single.

    transformers reads a file in the file's own precision, and a half-precision text encoder beside a
    single-precision denoiser is an error on a CPU.
    """
    names = [name for name in ("unet", "transformer", "vae") if getattr(pipeline, name, None) is not None]
    for name in names:
        round_to_half(getattr(pipeline, name))
        getattr(pipeline, name).half()
    pipeline.save_pretrained(folder)
    for name in names:
        getattr(pipeline, name).float()


def write_clip(model: CLIPModel, folder: Path, *, for_open_clip: bool = False) -> None:
    """A folder for `CLIPModel` and `CLIPProcessor.from_pretrained`, and for open_clip's `local-dir:` if asked."""
    round_to_half(model)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": RESOLUTION},
        crop_size={"height": RESOLUTION, "width": RESOLUTION},
        image_mean=[open_clip_export.MEAN_AND_STD] * 3,
        image_std=[open_clip_export.MEAN_AND_STD] * 3,
    )
    CLIPProcessor(processor, clip_tokenizer()).save_pretrained(folder)
    if for_open_clip:
        open_clip_export.write(model, folder)
