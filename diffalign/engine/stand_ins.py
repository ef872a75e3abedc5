"""Tiny random stand-ins on disk: for a recipe's pipeline, by its class, and rewards and pairs that are elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from diffalign import media
from diffalign.data import Judged, Prompt, write_pairs
from diffalign.policies import tiny, tiny_families
from diffalign.recipe_problems import Problem, RecipeError
from diffalign.registry import resolve_data
from diffalign.rewards import RewardRecipe, read_recipe
from diffalign.rewards.recipe import REWARD_TYPES, recipe_path
from diffalign.rewards.recipe_sets import SetRecipe
from diffalign.search_recipe import VIDEO_TYPES

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

# Keys of reward recipes: what names a network, what lies beside one, one file, and other rewards.
NETWORKS = ("path", "detector", "clip")
BESIDE = ("processor", "tokenizer", "base")
FILES = ("checkpoint", "head")
PARTS = ("reward", "where", "objective", "terms", "members", "constraints")

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


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
    """The recipe of a reward of which a network is not on this machine; None for one that can be loaded as it is.

    Args:
        name: a name, or the file of a recipe.

    Returns:
        The recipe, whose exemplars and captions have absolute paths.

    Raises:
        RecipeError: it is missing and scores videos, of which a stand-in for images would say nothing.
    """
    file = recipe_path(name, Path.cwd())
    if file is None:
        return None  # a plug-in's: only its code knows what it needs
    recipe = read_recipe(file)
    if not _is_missing(recipe, file.parent):
        return None
    if _scores_videos(recipe, file.parent):
        told = "scores videos, and the pipeline draws images: use another"
        raise RecipeError("--dry-run", [Problem(f"reward {recipe.name}", told)])
    beside = {key: getattr(recipe, key, None) for key in ("exemplars", "captions")}
    found = {key: str(resolve_data(source, file.parent)) for key, source in beside.items() if source is not None}
    return recipe.model_copy(update=found)


def _is_missing(recipe: RewardRecipe, folder: Path) -> bool:
    """Whether something that a recipe names, or one that it is made of, is not on this machine."""
    return not _has_its_own(recipe, folder) or any(_is_missing(*part) for part in _made_of(recipe, folder))


def _scores_videos(recipe: RewardRecipe, folder: Path) -> bool:
    return recipe.type.casefold() in VIDEO_TYPES or any(_scores_videos(*part) for part in _made_of(recipe, folder))


def _made_of(recipe: RewardRecipe, folder: Path) -> Iterator[tuple[RewardRecipe, Path]]:
    """The recipes of the rewards that a reward is made of, but a plug-in's; and where their relative paths start."""
    for part in _parts([getattr(recipe, key) for key in PARTS if hasattr(recipe, key)]):
        file = None if isinstance(part, dict) else recipe_path(part, folder)
        if isinstance(part, dict):
            yield REWARD_TYPES.get(part["type"]).model_validate(part), folder
        elif file is not None:
            yield read_recipe(file), file.parent


def _parts(value: Any) -> Iterator[str | dict[str, Any]]:
    """The rewards that a reward is made of: names, files and recipes in place."""
    if isinstance(value, list):
        for each in value:
            yield from _parts(each)
    else:
        yield getattr(value, "reward", value)  # of a weighted or bounded one


def _has_its_own(recipe: RewardRecipe, folder: Path) -> bool:
    """Whether the networks and files that a recipe itself names are on this machine."""
    revision = getattr(recipe, "revision", None)

    def here(key: str, names: tuple[str, ...]) -> bool:
        source = getattr(recipe, key, None)
        return source is None or any(on_disk(source, name, revision, folder) for name in names)

    processed = getattr(recipe, "processor", None) is not None
    networks = all(here(key, WEIGHTS) and (processed or here(key, PROCESSORS)) for key in NETWORKS)
    beside = all(here(key, (*PROCESSORS, "tokenizer_config.json", "config.json")) for key in BESIDE)
    return networks and beside and all(_has_file(getattr(recipe, key, None), revision, folder) for key in FILES)


def _has_file(source: str | None, revision: str | None, folder: Path) -> bool:
    """Whether a file, or OWNER/NAME/FILE of the hub, is on this machine; yes where none is named."""
    named = re.fullmatch(r"([^/]+/[^/]+)/(.+)", source or "")
    if source is None or resolve_data(source, folder).is_file():
        return True
    return named is not None and on_disk(named[1], named[2], revision) is not None


def write_reward(recipe: RewardRecipe, folder: Path) -> Path:
    """Saves a tiny random stand-in of a reward, a recipe of the same name; returns its file.

    It is a CLIP score. For a reward without a gradient it is the size of a JPEG, so that a method that needs a gradient
    refuses it as well; a reward of sets or of exemplars stays what it is, on a tiny CLIP.
    """
    tree = {"name": recipe.name, "scale": recipe.scale, "licence": "none", "source": "random weights of a dry run"}
    folder.mkdir()
    if isinstance(recipe, SetRecipe):
        elsewhere = {"library", "processor", "revision", "token_limit"}
        tree = recipe.model_dump(mode="json", exclude=elsewhere, exclude_none=True) | tree | {"path": "."}
        _save_clip(folder)
    elif recipe.differentiable is False:
        tree["type"] = "jpeg_size"
    else:
        kind = recipe.type if recipe.type.casefold() in ("clip", "pickscore") else "clip"
        tree |= {"type": kind, "path": "."}
        _save_clip(folder)
    file = folder / "reward.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def _save_clip(folder: Path) -> None:
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


def write_random_pairs(file: Path, count: int) -> None:
    """Writes that many pairs of small images of noise, in Pick-a-Pic's columns."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    write_pairs(file, [Judged(Prompt(f"pair {n}", n), two, (1.0, 0.0)) for n, two in enumerate(images)])


def write_random_images(folder: Path) -> Path:
    """Writes two small images of noise, and returns their list as `diffalign sample` writes one."""
    folder.mkdir()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for n, image in enumerate(images):
        media.save_png(image, folder / f"{n}.png")
    rows = [json.dumps({"file": f"{n}.png", "prompt": f"image {n}"}) for n in range(len(images))]
    (folder / "samples.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "samples.jsonl"


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
