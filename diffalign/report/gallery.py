"""Before and after on one sheet: a picture for a README, a paper or a chat."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _MUTED, _PAPER = "#1b1d22", "#6b7079", "#ffffff"


def before_after(
    base: Sequence[Image.Image],
    tuned: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int = 6,
    tile: int = 160,
    labels: tuple[str, str] = ("base", "tuned"),
) -> Image.Image:
    """A sheet with a column for each prompt: the base image above, the tuned one below, the caption under both.

    Args:
        base: images before.
        tuned: images of the same prompts and the same starting noise after, in the same order.
        captions: the prompts; long ones are wrapped, and cut after three lines.
        columns: pairs side by side, before the next row of pairs starts.
        tile: side of a shown image in pixels; small images are enlarged whole times, without smoothing, to about that.
        labels: names of the two rows.
    """
    if not 0 < len(base) == len(tuned) == len(captions):
        raise ValueError(
            f"{len(base)} base images, {len(tuned)} tuned and {len(captions)} captions: must be equal, not 0."
        )
    columns, side = min(columns, len(base)), max(base[0].size)
    tile = side * max(1, round(tile / side)) if side <= tile else tile
    font, gap, margin = ImageFont.load_default(size=13), 8, 62
    lines = [_wrapped(caption, font, tile) for caption in captions]
    height = 2 * tile + gap // 2 + 18 * max(len(text) for text in lines) + 3 * gap
    rows = -(-len(base) // columns)
    sheet = Image.new("RGB", (margin + columns * (tile + gap), rows * height + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (before, after, text) in enumerate(zip(base, tuned, lines, strict=True)):
        row, column = divmod(index, columns)
        left, top = margin + column * (tile + gap), gap + row * height
        for image, label, y in ((before, labels[0], top), (after, labels[1], top + tile + gap // 2)):
            sheet.paste(_fitted(image, tile), (left, y))
            if column == 0:
                draw.text((margin - gap, y + tile // 2), label, _MUTED, font, anchor="rm")
        for number, line in enumerate(text):
            draw.text((left, top + 2 * tile + gap + 18 * number), line, _INK, font)
    return sheet


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    if max(image.size) <= tile:
        return enlarged(image, tile // max(image.size))
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Each pixel as a square of ``factor`` pixels."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
        lines[-1] = lines[-1][:-2].rstrip() + "…"
    return lines
