"""Curves of a run as inline SVG that takes its colours and fonts from the page, so light and dark need one picture."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.report.statistics import is_oracle

Row = Mapping[str, Any]

# Colours that nothing else uses, replaced by the page's CSS variables in the finished SVG.
INK, MUTED, GRID, LINE, SECOND = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "hairline", LINE: "line-1", SECOND: "line-2"}


@dataclass(frozen=True)
class Chart:
    """A finished picture.

    Attributes:
        title: what it shows.
        key: where the numbers come from, in the words of ``metrics.jsonl``.
        svg: an ``<svg>`` element.
    """

    title: str
    key: str
    svg: str


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; an empty list without the file. ValueError names a broken line."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from None
    return rows


def curves(rows: Sequence[Row]) -> list[Chart]:
    """One chart for each quantity that the rows have; what is missing is left out."""
    charts = [_training_reward(rows, name) for name in _names(rows, "reward/")]
    validated = [name for name in _names(rows, "validation/") if f"reward/{name}" not in _keys(rows)]
    charts += [_validated(rows, f"validation/{name}", f"{name}, validation prompts") for name in validated]
    held = _names(rows, "heldout/")
    for name in sorted(held, key=is_oracle):
        charts.append(_validated(rows, f"heldout/{name}", name if is_oracle(name) else f"{name}, held out"))
    charts += [
        _proxy_and_gold(rows, proxy, gold) for proxy in _names(rows, "validation/") for gold in held if is_oracle(gold)
    ]
    charts.append(_validated(rows, "diversity", "Diversity of the validation images"))
    for key, title in (
        ("kl", "KL divergence to the base model"),
        ("prediction_mse", "Prediction error to the base model"),
        ("weight_l2", "Squared distance of the weights from the base model"),
        ("sft", "Denoising error of the supervised images"),
        ("grad_norm", "Gradient norm"),
    ):
        charts.append(_every_step(rows, key, title))
    return [chart for chart in charts if chart is not None]


def _keys(rows: Sequence[Row]) -> dict[str, None]:
    return {key: None for row in rows for key in row}


def _names(rows: Sequence[Row], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in _keys(rows) if key.startswith(prefix)]


def _series(rows: Sequence[Row], *keys: str) -> np.ndarray:
    """(n, len(keys)) of the rows that have all the keys as finite numbers."""
    found = [[row.get(key) for key in keys] for row in rows]
    return np.array([row for row in found if all(_is_number(x) for x in row)], dtype=float).reshape(-1, len(keys))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred triangular average over about a fifteenth of the curve on either side; ends use what is there."""
    radius = max(1, len(values) // 15)
    kernel = 1 - np.abs(np.arange(-radius, radius + 1)) / (radius + 1)
    cut = slice(radius, radius + len(values))
    return (np.convolve(values, kernel)[cut]) / np.convolve(np.ones(len(values)), kernel)[cut]


def _training_reward(rows: Sequence[Row], name: str) -> Chart | None:
    steps = _series(rows, "step", f"reward/{name}")
    validation = _series(rows, "step", f"validation/{name}")
    if len(steps) < 2:
        return None
    figure, axes = canvas()
    _noisy_line(axes, steps)
    if len(validation):
        axes.plot(*validation.T, color=SECOND, lw=1.6, marker="o", ms=4, zorder=4)
        label_ends(axes, [("training prompts", LINE), ("validation prompts", SECOND)])
    return finish(figure, axes, f"{name}, trained on", f"reward/{name}")


def _every_step(rows: Sequence[Row], key: str, title: str) -> Chart | None:
    points = _series(rows, "step", key)
    if len(points) < 2 or not points[:, 1].any():
        return None
    figure, axes = canvas()
    _noisy_line(axes, points)
    axes.set_ylim(bottom=0)
    return finish(figure, axes, title, key)


def _validated(rows: Sequence[Row], key: str, title: str) -> Chart | None:
    points = _series(rows, "step", key)
    if len(points) < 2:
        return None
    figure, axes = canvas()
    axes.plot(*points.T, color=SECOND, lw=1.6, marker="o", ms=4)
    axes.axhline(points[0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)), zorder=1)
    return finish(figure, axes, title, key)


def _proxy_and_gold(rows: Sequence[Row], proxy: str, gold: str) -> Chart | None:
    """Over-optimisation: where the learned reward still rises and the oracle no longer does."""
    points = _series(rows, f"validation/{proxy}", f"heldout/{gold}", "step")
    if len(points) < 2:
        return None
    figure, axes = canvas()
    axes.plot(points[:, 0], points[:, 1], color=SECOND, lw=1.2, marker="o", ms=4)
    for index, name in ((0, "base"), (-1, f"step {points[-1, 2]:.0f}")):
        axes.annotate(name, points[index, :2], (9, -3), textcoords="offset points", color=MUTED, fontsize=9.5)
    axes.margins(x=0.12)
    return finish(figure, axes, f"{gold} against {proxy}", "validation prompts", xlabel=proxy)


def canvas(width: float = 4.0, height: float = 2.45) -> tuple[Any, Any]:
    """Empty (figure, axes) of so many inches."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=5)
    axes.xaxis.set_major_locator(_ticks(6, integer=True))
    axes.yaxis.set_major_locator(_ticks(5))
    return figure, axes


def _ticks(count: int, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _noisy_line(axes: Any, points: np.ndarray) -> None:
    axes.plot(*points.T, color=LINE, lw=0.8, alpha=0.35)
    axes.plot(points[:, 0], smooth(points[:, 1]), color=LINE, lw=1.9, solid_capstyle="round")


def label_ends(axes: Any, labels: Iterable[tuple[str, str]]) -> None:
    """Names of lines, each in its colour, below on the right."""
    for row, (text, colour) in enumerate(labels):
        axes.text(0.98, 0.17 - 0.11 * row, text, color=colour, fontsize=9.5, ha="right", transform=axes.transAxes)


def finish(figure: Any, axes: Any, title: str, key: str, xlabel: str = "step") -> Chart:
    """The chart of a figure whose axes are drawn."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    if xlabel not in ("step", "") and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(xlabel, parse_math=False, color=MUTED, fontsize=9.5)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{title}/{key}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, key, _inline(buffer.getvalue(), title))


def _inline(document: str, title: str) -> str:
    """The <svg> element alone, in the page's colours and fonts, without ids that another chart has too."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z]+[A-Za-z0-9]*_\d+"', "", svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} {box} role="img" aria-label="{escape(title)}"' + svg[svg.index(">") :]
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
