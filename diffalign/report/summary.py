"""What a run tells its report, apart from its metrics; saved beside them as ``summary.json``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from diffalign.report.statistics import Figure

FILE = "summary.json"


@dataclass(frozen=True)
class Pair:
    """Images of the same prompt and starting noise, before and after.

    Attributes:
        prompt: the prompt's text.
        seed: what names the noise, e.g. "seed 0, image 2".
        base, tuned: image files, relative to the run's folder.
        scores: reward name -> (base, tuned).
    """

    prompt: str
    seed: str
    base: str
    tuned: str
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The comparison that a report shows.

    Attributes:
        title: of the page.
        pipeline: the base model as the recipe names it: zoo:NAME, a folder or a hub id.
        facts: short label -> text, shown under the title: method, steps, seed, revision, duration, device.
        figures: base against tuned, on the test prompts.
        gallery: pairs to show.
        cost: phase -> `Ledger.as_dict`.
        sampling: keyword arguments of the pipeline's call that give the report's images.
        notes: how it was measured, one sentence each.
        recipe: the resolved recipe as YAML.
        versions: library -> version.
        lora: folder of the LoRA, relative to the run's folder.
        prompts: the test prompts as the recipe names them, for the command that draws their images again.
        noise: safetensors file with the starting noise of the gallery's images, by the number in their names, relative
            to the run's folder; None where the sampler is stochastic.
    """

    title: str
    pipeline: str
    facts: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    gallery: list[Pair] = field(default_factory=list)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recipe: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    lora: str = "lora"
    prompts: str = ""
    noise: str | None = None

    def save(self, run_dir: Path) -> Path:
        """Writes ``summary.json``; numbers that are not finite become null, which JSON can hold."""
        path = run_dir / FILE
        path.write_text(json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Reads ``summary.json``. ValueError if it is not what `save` writes."""
        path = run_dir / FILE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            figures = [
                Figure(**{k: math.nan if v is None else v for k, v in row.items()}) for row in tree.pop("figures")
            ]
            gallery = [Pair(**(row | {"scores": _pairs(row["scores"])})) for row in tree.pop("gallery")]
            return cls(figures=figures, gallery=gallery, **tree)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not the summary of a run ({error}): write it again with Summary.save."
            ) from None


def _pairs(scores: dict[str, list[float | None]]) -> dict[str, tuple[float, float]]:
    return {name: tuple(math.nan if x is None else x for x in pair) for name, pair in scores.items()}


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
