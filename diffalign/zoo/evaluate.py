"""Sample a pipeline on the zoo's prompts and let the oracle judge: the figures of the cards."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.zoo.oracle import Verdicts, judge

SETTINGS = {"shapes-turbo": {"num_inference_steps": 1, "guidance_scale": 1.0}}
"""How a pipeline is sampled, by its name, where it is not with `USUAL`."""

USUAL = {"num_inference_steps": 20, "guidance_scale": 3.0}
FAST = {"StableDiffusion3Pipeline": {"max_sequence_length": 16}}
"""Arguments that spare time: the silent T5 may be short (see `sd3`)."""


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seed: int = 0, batch: int = 32, name: str = ""
) -> torch.Tensor:
    """Images (B, 3, 64, 64) as a user would save them: rounded to 8 bits, in [0, 1]. Image i has noise (seed, i).

    `name` is the pipeline's in the zoo, for its `SETTINGS`.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        seeds = [seed * 1_000_003 + start + i for i in range(len(chunk))]
        images.append(
            pipeline(
                chunk,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                output_type="pt",
                **SETTINGS.get(name, USUAL),
                **FAST.get(type(pipeline).__name__, {}),
            ).images
        )
    return (torch.cat(images).float() * 255).round() / 255


def read_prompts(file: Path, count: int | None = None) -> list[str]:
    """The first `count` prompts of a JSONL file."""
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def figures(prompts: Sequence[str], verdicts: Verdicts) -> dict[str, float]:
    """All-correct for one and two objects with its standard error, the mean fraction, and each kind of fact."""
    two = torch.tensor([any(name == "relation" for name in facts) for facts in verdicts.facts])
    rows: dict[str, list[float]] = {"fraction": verdicts.fraction.tolist()}
    for name, chosen in (("one_object", ~two), ("two_objects", two)):
        rows[name] = verdicts.all_correct[chosen].float().tolist()
    for facts in verdicts.facts:
        for name, holds in facts.items():
            rows.setdefault(name.split()[0], []).append(float(holds))
    means = {name: sum(values) / len(values) for name, values in rows.items() if values}
    n = int(two.sum())
    if n:
        means["two_objects_standard_error"] = (means["two_objects"] * (1 - means["two_objects"]) / n) ** 0.5
    return {name: round(value, 4) for name, value in means.items()} | {"prompts": len(prompts), "two_object_prompts": n}


def sheet(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """A contact sheet, row by row."""
    rows = -(-len(images) // columns)
    padded = torch.ones(rows * columns, *images.shape[1:])
    padded[: len(images)] = images
    grid = padded.view(rows, columns, *images.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((grid * 255).round().byte().numpy())


def evaluate(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seed: int = 0, name: str = ""
) -> tuple[dict[str, float], torch.Tensor]:
    """Figures and images on `prompts`; `name` as in `sample`."""
    images = sample(pipeline, prompts, seed, name=name)
    return figures(prompts, judge(images, prompts)), images
