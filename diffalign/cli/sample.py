"""`diffalign sample`: the same images as the evaluation of a run, for the same prompts file, seed and settings.

With `--pairs` a reward chooses among the images of each prompt, and the pairs are written for DPO to learn from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from diffalign.config import EvaluationConfig, PipelineConfig, Problem, RecipeError, load_recipe
from diffalign.recipe_file import shipped_recipes
from diffalign.recipe_references import DRAWN, anchor_paths, check_references
from diffalign.registry import PROMPT_SUFFIXES

if TYPE_CHECKING:
    from diffalign.data import Prompt
    from diffalign.engine.evaluate import Evaluation
    from diffalign.policies import Policy

IMAGES_TO_CHOOSE_FROM = 4


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
    pairs: bool,
    reward: str | None,
) -> None:
    """Draws, and writes `NNNNN-II.png` (prompt, image), `grid.png` and `samples.jsonl` into `out`; or pairs."""
    pipeline, evaluation, default_seed = settings(source)
    if pairs:
        num_images_per_prompt = num_images_per_prompt or max(IMAGES_TO_CHOOSE_FROM, evaluation.num_images_per_prompt)
    refuse_pairs(pairs, reward, out, num_images_per_prompt)
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
    if pairs and reward is not None:
        return write_pairs(policy, chosen, reward, evaluation, seed, out)
    images = sample_images(policy, chosen, seed=seed, **evaluation.sampling())
    write(images, out, evaluation.num_images_per_prompt, seed)
    print(f"{len(images.prompts)} images: {out}")


def refuse_pairs(pairs: bool, reward: str | None, out: Path, num_images_per_prompt: int | None) -> None:
    """RecipeError for options that do not go with `--pairs`, or not without."""
    if not pairs:
        if reward is not None:
            _refuse_with(f"--reward {reward}", "chooses pairs: add --pairs, or score the folder with `diffalign score`")
        return
    if reward is None:
        _refuse_with("--pairs", "needs what chooses: add --reward NAME (`diffalign ls rewards`)")
    if out.suffix != ".parquet":
        _refuse_with(f"--out {out}", f"should be a .parquet file with --pairs: write {out.with_suffix('.parquet')}")
    if num_images_per_prompt is not None and num_images_per_prompt < 2:
        _refuse_with(f"--num-images-per-prompt {num_images_per_prompt}", "leaves nothing to choose: use 2 or more")
    _refuse({"rewards": {"train": [reward]}}, "--reward")


def _refuse_with(place: str, message: str) -> NoReturn:
    raise RecipeError("diffalign sample", [Problem(place, message)])


def write_pairs(
    policy: Policy, prompts: list[Prompt], reward: str, evaluation: EvaluationConfig, seed: int, out: Path
) -> None:
    """Draws, scores, writes the best against the worst, and tells how many prompts gave no pair."""
    from diffalign import rewards
    from diffalign.data import write_pairs as write_rows
    from diffalign.engine.pairs import LeftOut, draw_pairs

    left_out = LeftOut()
    judge = rewards.load(reward).to(policy.device)
    count = write_rows(out, draw_pairs(policy, prompts, judge, evaluation, seed, left_out))
    told = f"{left_out.ties} with equal scores and {left_out.failed} with fewer than two scores are left out"
    print(f"{count} pairs of {len(prompts)} prompts, of {evaluation.num_images_per_prompt} images each; {told}: {out}")


def settings(source: str) -> tuple[PipelineConfig, EvaluationConfig, int]:
    """Pipeline, sampling and seed of a recipe, or of a bare pipeline with the defaults."""
    if source.endswith((".yaml", ".yml")) or source in shipped_recipes():
        recipe = load_recipe(source, absent=DRAWN)  # what they name may be what is drawn
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

    if prompts.startswith("prompts:") or Path(prompts).suffix in PROMPT_SUFFIXES:
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
