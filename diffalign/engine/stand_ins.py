"""Tiny random stand-ins on disk, of a recipe's pipeline by its class and of rewards that are not on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from diffalign.policies import tiny, tiny_families
from diffalign.recipe_problems import Problem, RecipeError
from diffalign.registry import resolve_data
from diffalign.rewards import RewardRecipe, read_recipe, shipped_recipes

if TYPE_CHECKING:
    from diffalign.config import PipelineConfig

BUILDERS: dict[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": tiny.tiny_sd,
    "StableDiffusionXLPipeline": tiny_families.tiny_sdxl,
    "LatentConsistencyModelPipeline": tiny_families.tiny_lcm,
    "StableDiffusion3Pipeline": tiny.tiny_sd3,
    "FluxPipeline": tiny_families.tiny_flux,
    "PixArtAlphaPipeline": partial(tiny_families.tiny_pixart_alpha, sample_size=8),
    "PixArtSigmaPipeline": tiny_families.tiny_pixart_sigma,
    "SanaPipeline": tiny_families.tiny_sana,
    "QwenImagePipeline": tiny_families.tiny_qwen,
}

# The model_index.json of a hub id says its class; these are known without it, so that nothing need be downloaded.
KNOWN = {
    "StableDiffusionPipeline": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-1-base",
        "stabilityai/sd-turbo",
    ),
    "StableDiffusionXLPipeline": ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo"),
    "LatentConsistencyModelPipeline": ("SimianLuo/LCM_Dreamshaper_v7",),
    "StableDiffusion3Pipeline": (
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
        "stabilityai/stable-diffusion-3.5-large-turbo",
    ),
    "FluxPipeline": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    "PixArtAlphaPipeline": ("PixArt-alpha/PixArt-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-512x512"),
    "PixArtSigmaPipeline": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"),
    "SanaPipeline": (
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "Efficient-Large-Model/Sana_600M_512px_diffusers",
    ),
    "QwenImagePipeline": ("Qwen/Qwen-Image",),
}

CLIP_TOKENS, CLIP_PIXELS = 77, 32


def write_pipeline(config: PipelineConfig, folder: Path) -> tuple[str, bool]:
    """Saves a tiny pipeline of the class of the recipe's, with its scheduler where that is on this machine.

    Returns:
        The class, and whether the scheduler is the recipe's own and not the usual one of the class.

    Raises:
        RecipeError: nothing on this machine says the class, or there is no tiny pipeline of it.
    """
    index = on_disk(config.path, "model_index.json", config.revision)
    parts = {} if index is None else json.loads(index.read_text(encoding="utf-8"))
    ids = {each.casefold(): name for name, known in KNOWN.items() for each in known}
    name = parts.get("_class_name") or ids.get(config.path.casefold())
    if name is None:
        raise _refused(
            config,
            f"is not on this machine and nothing says its class: download its model_index.json first (a few hundred "
            f"bytes: hf download {config.path} model_index.json)",
        )
    if name not in BUILDERS:
        raise _refused(config, f"is a {name}, of which there is no tiny one: use one of {', '.join(BUILDERS)}")
    pipe = BUILDERS[name]()
    file = on_disk(config.path, "scheduler/scheduler_config.json", config.revision)
    if file is not None and "scheduler" in parts:
        import diffusers

        pipe.scheduler = getattr(diffusers, parts["scheduler"][1]).from_pretrained(file.parent)
    pipe.save_pretrained(folder, safe_serialization=True)
    return name, file is not None and "scheduler" in parts


def _refused(config: PipelineConfig, message: str) -> RecipeError:
    return RecipeError("--dry-run", [Problem(f"pipeline.path = {config.path}", message)])


def missing_reward(name: str) -> RewardRecipe | None:
    """The recipe of a reward whose weights are not on this machine; None for one that can be loaded as it is."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else shipped_recipes().get(name.casefold())
    if file is None:
        return None  # a plug-in's: only its code knows what it needs
    recipe = read_recipe(file)
    if getattr(recipe, "path", None) is None:
        return None  # it has no encoder to look for
    weights = ("model.safetensors", "model.safetensors.index.json")
    processor = getattr(recipe, "processor", None)
    source, revision = (recipe.path, recipe.revision) if processor is None else (processor, None)
    processors = ("preprocessor_config.json", "processor_config.json")
    found = any(on_disk(recipe.path, each, recipe.revision, file.parent) for each in weights)
    readable = any(on_disk(source, each, revision, file.parent) for each in processors)
    return None if found and readable else recipe


def write_reward(recipe: RewardRecipe, folder: Path) -> Path:
    """Saves a tiny random CLIP and a reward recipe of the same name and type that names it; returns the recipe."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=CLIP_PIXELS,
        patch_size=8,
    )
    text = tiny.clip_config(CLIP_TOKENS)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    tiny.clip_tokenizer(CLIP_TOKENS).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": CLIP_PIXELS, "crop_size": CLIP_PIXELS}))
    kind = recipe.type if recipe.type.casefold() in ("clip", "pickscore") else "clip"
    tree = {"name": recipe.name, "type": kind, "path": ".", "scale": recipe.scale}
    tree |= {"licence": "none", "source": "random weights of a dry run"}
    file = folder / "reward.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def on_disk(source: str, name: str, revision: str | None = None, relative_to: Path | None = None) -> Path | None:
    """A file of a folder or of a hub id that lies on this machine, the hub's cache included; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    folder = resolve_data(source, relative_to or Path.cwd())
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no hub id either: what loads it will say so
        return None
    return Path(found) if isinstance(found, str) else None
