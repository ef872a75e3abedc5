"""The best and the worst of each reward on one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign import media
from diffalign.report.page import data_uri, template
from diffalign.scoring.decode import decode_ahead, quiet
from diffalign.scoring.items import Item
from diffalign.scoring.summary import RewardSummary
from diffalign.scoring.table import Columns

SHOWN = 12
_SIDE = 256  # pixels of a thumbnail's longer side


@quiet()
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
    return template(Path(__file__).with_name("gallery.html")).render(facts=facts, sections=sections, rows=len(items))


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
    return data_uri(media.to_pil(frame[None])[0], _SIDE)
