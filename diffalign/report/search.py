"""The page of a search: what was found beside the plain image, the best reward over the budget, trees, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file

from diffalign.report import search_charts
from diffalign.report.page import COST, FigureView, cost_cells, pair_view, template
from diffalign.report.statistics import Figure, compare, is_oracle
from diffalign.report.summary import Pair
from diffalign.versions import versions

if TYPE_CHECKING:
    from diffalign.search_recipe import SearchRecipe

Row = Mapping[str, Any]
"""A line of ``results.jsonl``."""

SHOWN_PAIRS, GALLERY, TREES = 12, 60, 3
_UNITS = {"nfe": "denoiser evaluations", "reward_calls": "reward calls", "seconds": "seconds"}


def write_search_report(folder: Path, recipe: SearchRecipe, rows: Sequence[Row]) -> Path:
    """Writes ``report.html`` into the folder of a search, from its files.

    Args:
        folder: holds the images and the traces of the rows.
        recipe: of the search.
        rows: of every prompt.

    Returns:
        The path of the page.
    """
    traces = [load_file(folder / row["trace"]) for row in rows]
    html = template(Path(__file__).with_name("search.html")).render(
        title=f"{Path(recipe.pipeline.path).name.removeprefix('zoo:')}: {recipe.method.name}",
        facts=_facts(recipe, rows),
        figures=[_view(figure) for figure in search_figures(rows, reward_name(recipe))],
        notes=_notes(rows),
        pairs=[pair_view(folder, pair) for pair in _pairs(rows, reward_name(recipe))[:GALLERY]],
        shown=SHOWN_PAIRS,
        charts=search_charts.anytime(traces, recipe.method.name),
        pool=any("pool/rewards" in trace for trace in traces),
        trees=_trees(rows, traces),
        cost=[(phase, cost_cells(total)) for phase, total in _cost(rows).items()],
        cost_heads=list(COST),
        recipe=(folder / "config.yaml").read_text(encoding="utf-8"),
        versions=versions(),
    )
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def reward_name(recipe: SearchRecipe) -> str:
    """What the reward that steers is called: its name, or those of a sum."""
    return " + ".join(Path(term.name).stem for term in recipe.rewards.train)


def search_figures(rows: Sequence[Row], reward: str) -> list[Figure]:
    """Base against found: the reward that selected, then the held-out ones. Prompts without a result are left out."""
    ids = [row["id"] for row in rows]

    def figure(name: str, kind: Any, values: Sequence[tuple[Any, Any]]) -> Figure:
        base, found = ([math.nan if x is None else x for x in side] for side in zip(*values, strict=True))
        return compare(name, kind, base, found, ids, unit="%" if is_oracle(name) else "")

    figures = [figure(reward, "training", [(row["base_reward"], row["found_reward"]) for row in rows])]
    for name in rows[0]["heldout"]:
        values = [(row["heldout"][name]["base"], row["heldout"][name]["found"]) for row in rows]
        figures.append(figure(name, "oracle" if is_oracle(name) else "heldout", values))
    return figures


def _view(figure: Figure) -> FigureView:
    view = FigureView.of(figure)
    return replace(view, kind="selected by") if figure.kind == "training" else view


def _facts(recipe: SearchRecipe, rows: Sequence[Row]) -> dict[str, str]:
    limits = {_UNITS[key]: limit for key, limit in recipe.budget.model_dump().items() if limit is not None}
    facts = {
        "method": recipe.method.name,
        "budget of a prompt": ", ".join(f"{limit:,} {unit}" for unit, limit in limits.items()),
        "prompts": f"{len(rows)}, seed {recipe.seed}",
        "sampling": f"{recipe.num_inference_steps} steps, guidance {recipe.guidance_scale:g}",
        "selected by": reward_name(recipe),
    }
    return facts | ({"LoRA": recipe.adapter.path} if recipe.adapter is not None else {})


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "Base is what the pipeline's deterministic sampler makes of the first noise that the search starts from; its "
        "cost is apart.",
        "Held-out rewards score the base and the found image alone, and select nothing. A maximum of noisy scores is "
        "biased upwards, so the reward that selected says least.",
        "Intervals are 95 % bootstrap intervals over prompts, paired. Every score is of 8-bit pixels.",
    ]
    empty = sum(row["found_reward"] is None for row in rows)
    return notes + ([f"Prompts for which every score failed, left out above: {empty}."] if empty else [])


def _pairs(rows: Sequence[Row], reward: str) -> list[Pair]:
    """The first images before and after, in the order of the prompts: no picture is chosen by its score."""
    return [
        Pair(
            row["prompt"],
            f"{row['results']:,} results, {row['nfe']:,} evaluations",
            row["images"]["base"],
            row["images"]["found"],
            {reward: _number_pair(row["base_reward"], row["found_reward"])}
            | {name: _number_pair(score["base"], score["found"]) for name, score in row["heldout"].items()},
        )
        for row in rows
        if "found" in row["images"]
    ]


def _number_pair(base: float | None, found: float | None) -> tuple[float, float]:
    return math.nan if base is None else base, math.nan if found is None else found


def _trees(rows: Sequence[Row], traces: Sequence[search_charts.Trace]) -> list[Any]:
    charts = [search_charts.tree(t, row["prompt"]) for row, t in zip(rows[:TREES], traces, strict=False)]
    return [chart for chart in charts if chart is not None]


def _cost(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    keys = [key for key, _ in COST.values() if key != "peak_memory_bytes"]
    phases = {"search": list(rows), "best-of-n beside it": [row["pool"] for row in rows if "pool" in row]}
    phases["base and held-out"] = [row["apart"] for row in rows]
    return {
        phase: {key: sum(row[key] for row in found) for key in keys if all(key in row for row in found)}
        for phase, found in phases.items()
        if found
    }
