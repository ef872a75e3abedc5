"""``report.html``: one self-contained page that opens offline, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign import media
from diffalign.registry import locate
from diffalign.report.charts import curves, read_metrics
from diffalign.report.gallery import before_after, enlarged
from diffalign.report.statistics import Figure
from diffalign.report.summary import Pair, Summary

SHOWN_PAIRS = 12
_SHARP = 256  # smaller images are enlarged by whole pixels to about this side, or a browser would blur them
_KINDS = {"training": "trained on", "heldout": "held out", "oracle": "oracle", "diversity": "diversity"}


def write_report(run_dir: str | Path, summary: Summary | None = None) -> Path:
    """Writes ``report.html`` and ``grid.png`` into a run folder.

    Args:
        run_dir: holds ``metrics.jsonl`` (curves are left out where it is not) and the images of the gallery.
        summary: what to show; default: the folder's ``summary.json``. A given one is saved there.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: no summary, or an image of the gallery is not there.
    """
    run_dir = Path(run_dir)
    if summary is None:
        summary = Summary.load(run_dir)
    else:
        summary.save(run_dir)
    if summary.gallery:
        write_grid(run_dir, summary.gallery[:SHOWN_PAIRS])
    html = template(Path(__file__).with_name("page.html")).render(
        summary=summary,
        figures=[FigureView.of(figure) for figure in summary.figures],
        pairs=[pair_view(run_dir, pair) for pair in summary.gallery],
        shown=SHOWN_PAIRS,
        charts=curves(read_metrics(run_dir / "metrics.jsonl")),
        cost=[(phase, cost_cells(row)) for phase, row in summary.cost.items()],
        cost_heads=list(COST),
        snippet=_snippet(run_dir, summary),
        command=_command(run_dir, summary) if summary.prompts else "",
    )
    path = run_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def write_grid(run_dir: Path, gallery: list[Pair]) -> Path:
    """Writes ``grid.png``, the pairs on one sheet."""
    path = run_dir / "grid.png"
    base, tuned = ([media.open_image(run_dir / getattr(pair, side)) for pair in gallery] for side in ("base", "tuned"))
    media.save_png(before_after(base, tuned, [pair.prompt for pair in gallery]), path)
    return path


def template(file: Path) -> Any:
    """The template of a page, which may include `style.css`, so that all pages look the same."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([file.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


@dataclass(frozen=True)
class FigureView:
    """A figure in words, and its interval as percentages of a bar with zero in the middle."""

    name: str
    kind: str
    base: str
    tuned: str
    difference: str
    interval: str
    verdict: str
    n: int
    bar: tuple[float, float, float] | None

    @classmethod
    def of(cls, figure: Figure) -> FigureView:
        """The view of a figure."""
        factor, unit = (100, " %") if figure.unit == "%" else (1, "")
        places = _places((figure.high - figure.low) / 2 * factor)
        known = math.isfinite(figure.low)

        def number(x: float, sign: str = "") -> str:
            return f"{x * factor:{sign}.{places}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(x) else "–"

        points = " points" if figure.unit == "%" else ""
        reach = max(abs(figure.low), abs(figure.high), 1e-12) * 1.08 if known else 1.0
        return cls(
            name=figure.name,
            kind=_KINDS[figure.kind],
            base=number(figure.base) + unit,
            tuned=number(figure.tuned) + unit,
            difference=number(figure.difference, "+") + points,
            interval=f"{number(figure.low, '+')} to {number(figure.high, '+')}" if known else "one prompt only",
            verdict="up" if figure.low > 0 else "down" if figure.high < 0 else "flat",
            n=figure.n,
            bar=tuple(50 + 50 * x / reach for x in (figure.low, figure.high, figure.difference)) if known else None,
        )


def _places(half_width: float) -> int:
    """Decimals that show two digits of the uncertainty."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    return min(5, max(0, 1 - math.floor(math.log10(half_width))))


def pair_view(run_dir: Path, pair: Pair) -> dict[str, Any]:
    """A pair as the page shows it."""
    images = {side: media.open_image(run_dir / getattr(pair, side)) for side in ("base", "tuned")}
    scores = [
        (name, f"{a:.3g}" if math.isfinite(a) else "–", f"{b:.3g}" if math.isfinite(b) else "–", b > a)
        for name, (a, b) in pair.scores.items()
    ]
    return {
        "prompt": pair.prompt,
        "seed": pair.seed,
        "scores": scores,
        "size": images["base"].size,
        **{side: data_uri(image) for side, image in images.items()},
    }


def data_uri(image: Image.Image, most: int | None = None) -> str:
    """Small images as PNG, the very pixels that were scored; large ones as JPEG, for PNG would make the page heavy.

    With `most` a larger image is reduced, in place, to so many pixels on its longer side.
    """
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= _SHARP else "jpeg"
    if most is not None:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    image = enlarged(image, max(1, _SHARP // max(image.size)))
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 92}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _seconds(x: float) -> str:
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{x:.1f} s"


def _bytes(x: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if x < 1024:
            return f"{x:.0f} {unit}"
        x /= 1024
    return f"{x:.2f} GiB"


COST = {
    "denoiser evaluations": ("nfe", "{:,.0f}".format),
    "backward passes": ("backward_passes", "{:,.0f}".format),
    "decodes": ("decodes", "{:,.0f}".format),
    "reward calls": ("reward_calls", "{:,.0f}".format),
    "failed scores": ("reward_failures", "{:,.0f}".format),
    "wall time": ("seconds", _seconds),
    "peak memory": ("peak_memory_bytes", _bytes),
}


def cost_cells(row: Mapping[str, float]) -> list[str]:
    """The cells of a row of cost, under the heads of `COST`."""
    return [form(row[key]) if row.get(key) is not None else "–" for key, form in COST.values()]


def _snippet(run_dir: Path, summary: Summary) -> str:
    """Plain diffusers: the first image of the gallery again where its noise was kept, else an image like it."""
    prompt = summary.gallery[0].prompt if summary.gallery else "a prompt of yours"
    arguments = "".join(f", {key}={value!r}" for key, value in summary.sampling.items())
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({locate(summary.pipeline)!r})",  # diffusers knows no zoo:
        f"pipe.load_lora_weights({str(run_dir / summary.lora)!r})",
    ]
    if summary.gallery and summary.noise is not None:
        number = Path(summary.gallery[0].tuned).name.partition("-")[0]
        lines.insert(1, "from safetensors.torch import load_file")
        lines.append(f"noise = load_file({str(run_dir / summary.noise)!r})")
        arguments += f", latents=noise[{number!r}][None]"
    return "\n".join([*lines, f"image = pipe({json.dumps(prompt, ensure_ascii=False)}{arguments}).images[0]", ""])


def _command(run_dir: Path, summary: Summary) -> str:
    """The command line that draws the tuned images of the page again."""
    options = {"--lora": run_dir / summary.lora, "--prompts": summary.prompts, "--out": "samples"}
    words = ["diffalign", "sample", run_dir / "config.yaml", *(word for option in options.items() for word in option)]
    return shlex.join(map(str, words))
