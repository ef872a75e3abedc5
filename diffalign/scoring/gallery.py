"""The best and the worst of each reward on one self-contained page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffalign import media, report
from diffalign.report.gallery import enlarged
from diffalign.scoring.decode import decode_ahead
from diffalign.scoring.items import Item
from diffalign.scoring.summary import RewardSummary
from diffalign.scoring.table import Columns

SHOWN = 12
_SIDE = 256  # pixels of a thumbnail's longer side


def gallery(
    items: Sequence[Item], columns: Columns, summaries: Sequence[RewardSummary], facts: Mapping[str, Any]
) -> str:
    """The page as HTML: of each reward its figures, its best and worst, sorted by score, and why others have none.

    Args:
        items: of all rows.
        columns: the table of scores.
        summaries: of each reward.
        facts: label -> text for the head of the page.
    """
    ranks = {summary.name: _ends(columns[summary.name]) for summary in summaries}
    wanted = sorted({row for best, worst in ranks.values() for row in best + worst})
    videos = any(items[row].is_video for row in wanted)
    pictures = {
        row: _thumbnail(pixels) for row, _, pixels in decode_ahead([(row, items[row]) for row in wanted], videos)
    }
    cards = {row: _card(row, columns, summaries, pictures[row]) for row in wanted}
    sections = [
        {
            "summary": summary,
            "mean": number(summary.mean),
            "interval": interval(summary),
            "ends": [
                (title, [(number(columns[summary.name][row]), cards[row]) for row in rows])
                for title, rows in zip(("Best", "Worst"), ranks[summary.name], strict=True)
                if rows
            ],
        }
        for summary in summaries
    ]
    return _template().render(facts=facts, sections=sections, style=_style(), rows=len(items))


def number(x: float) -> str:
    """Four digits."""
    return f"{x:.4g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(x) else "–"


def interval(summary: RewardSummary) -> str:
    """The 95 % interval in words."""
    return f"{number(summary.low)} to {number(summary.high)}" if math.isfinite(summary.low) else "one prompt only"


def _ends(values: Sequence[float | None]) -> tuple[list[int], list[int]]:
    """Rows with the highest scores, best first, and with the lowest, worst first; no row is in both."""
    ranked = sorted((row for row, value in enumerate(values) if value is not None), key=lambda row: -values[row])
    shown = min(SHOWN, math.ceil(len(ranked) / 2))
    return ranked[:shown], ranked[shown:][::-1][:SHOWN]


def _card(row: int, columns: Columns, summaries: Sequence[RewardSummary], picture: str | None) -> dict[str, Any]:
    scores = [(s.name, columns[s.name][row]) for s in summaries]
    return {
        "picture": picture,
        "prompt": columns["prompt"][row],
        "path": columns["path"][row],
        "scores": [(name, number(value) if value is not None else "–") for name, value in scores],
    }


def _thumbnail(pixels: Tensor | str) -> str | None:
    """A data URI: small images as PNG enlarged by whole pixels, large ones reduced, of a video the middle frame."""
    if isinstance(pixels, str):  # the file is gone since it was scored
        return None
    frame = pixels if pixels.ndim == 3 else pixels[len(pixels) // 2]
    image, buffer = media.to_pil(frame[None])[0], io.BytesIO()
    small = max(image.size) <= _SIDE
    if small:
        image = enlarged(image, max(1, _SIDE // max(image.size)))
    else:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "png" if small else "jpeg", **({"optimize": True} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("gallery.html")


def _style() -> str:
    """That of a run's report, so that both pages look the same."""
    page = (Path(report.__file__).parent / "page.html").read_text(encoding="utf-8")
    return re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
