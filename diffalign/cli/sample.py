"""`diffalign sample`: the same images as the evaluation of a run, for the same prompts file, seed and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.config import EvaluationConfig, PipelineConfig, Problem, RecipeError, load_recipe
from diffalign.recipe_file import shipped_recipes
from diffalign.recipe_references import anchor_paths, check_references

if TYPE_CHECKING:
    from diffalign.data import Prompt
    from diffalign.engine.evaluate import Evaluation


def run(
    source: str,
    *,
    lora: Path | None,
    prompts: str,
    out: Path,
    seed: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    num_images_per_prompt: int | None,
) -> None:
    """Draws, and writes `NNNNN-II.png` (prompt, image), `grid.png` and `samples.jsonl` into `out`."""
    pipeline, evaluation, default_seed = settings(source)
    asked = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": num_images_per_prompt,
    }
    evaluation = evaluation.model_copy(update={key: value for key, value in asked.items() if value is not None})
    seed = default_seed if seed is None else seed
    if lora is not None:
        _refuse({"adapter": {"path": str(lora)}}, "--lora")

    from diffalign.cli.terminal import quiet_loading
    from diffalign.engine.evaluate import sample_images
    from diffalign.engine.load import load_policy

    quiet_loading()
    chosen = read(prompts)
    policy = load_policy(pipeline)
    if lora is not None:
        policy.load_lora(lora)
    images = sample_images(policy, chosen, seed=seed, **evaluation.sampling())
    write(images, out, evaluation.num_images_per_prompt, seed)
    print(f"{len(images.prompts)} images: {out}")


def settings(source: str) -> tuple[PipelineConfig, EvaluationConfig, int]:
    """Pipeline, sampling and seed of a recipe, or of a bare pipeline with the defaults."""
    if source.endswith((".yaml", ".yml")) or source in shipped_recipes():
        recipe = load_recipe(source)
        return recipe.pipeline, recipe.evaluation, recipe.seed
    tree = {"pipeline": {"path": source}}
    anchor_paths(tree, Path.cwd())
    _refuse(tree, "RECIPE_OR_PIPELINE")
    return PipelineConfig(path=tree["pipeline"]["path"]), EvaluationConfig(), 0


def _refuse(tree: dict, place: str) -> None:
    problems = check_references(tree)
    if problems:
        raise RecipeError(place, problems)


def read(prompts: str) -> list[Prompt]:
    """The prompts of a file or of `prompts:NAME`, else the text itself as one prompt."""
    from diffalign.data import Prompt, read_prompts

    if prompts.startswith("prompts:") or Path(prompts).suffix in (".txt", ".jsonl"):
        return read_prompts(prompts)
    if not prompts.strip():
        raise RecipeError(
            "--prompts", [Problem("--prompts", "is empty: give a file, prompts:NAME, or a prompt's text")]
        )
    return [Prompt(prompts, 0)]


def write(images: Evaluation, out: Path, num_images_per_prompt: int, seed: int) -> None:
    """Files of an evaluation; the uint8 pixels are written as they were scored."""
    from diffalign import media

    out.mkdir(parents=True, exist_ok=True)
    tiles = media.to_pil(media.from_uint8(images.images))
    with (out / "samples.jsonl").open("w", encoding="utf-8") as rows:
        for position, (prompt, tile) in enumerate(zip(images.prompts, tiles, strict=True)):
            number, image = divmod(position, num_images_per_prompt)
            file = f"{number:05d}-{image:02d}.png"
            media.save_png(tile, out / file)
            row = {"file": file, "prompt": prompt.text, "id": prompt.id, "image": image, "seed": seed}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    media.save_png(media.grid(tiles), out / "grid.png")
