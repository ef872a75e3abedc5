"""Images with their captions, for the supervised term of a loss."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.prompts import MAX_BYTES
from diffalign.data.rows import PROMPT_KEYS, line_object, take_text

FILE_KEYS = ("file", "file_name")  # of `diffalign sample`, and of an imagefolder
CAPTION_KEYS = (*PROMPT_KEYS, "text")


@dataclass(frozen=True)
class Captioned:
    """An image with its caption, not opened yet.

    Attributes:
        caption: what it shows.
        image: its file.
        source: where it is listed, for messages.
    """

    caption: str
    image: Path
    source: str


def read_captioned(path: str | Path) -> list[Captioned]:
    """Reads a JSONL that lists images: the ``samples.jsonl`` of ``diffalign sample``, or an imagefolder's metadata.

    A line is an object with ``file`` (or ``file_name``), a path that starts from the folder of the list, and ``prompt``
    (or ``caption``, or ``text``). Blank lines and other keys are skipped.

    Raises:
        FileNotFoundError: there is no such list, or not an image that a line names.
        ValueError: file and line of what is wrong.
    """
    path, found = Path(path), []
    if not path.is_file():
        wrong = "is a folder: give the .jsonl in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"list of images {path} {wrong}.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: split it.")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            source = f"{path}, line {number}"
            try:
                row = line_object(raw, number == 1, "file and prompt")
                if row is None:
                    continue
                image, caption = path.parent / take_text(row, FILE_KEYS), take_text(row, CAPTION_KEYS)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise ValueError(f"{source}: {error}.") from None
            if not os.path.isfile(image):  # and not `is_file`, which raises for a name that is too long
                raise FileNotFoundError(f"{source}: {image} does not exist: paths start from the list's own folder.")
            found.append(Captioned(caption, image, source))
    if not found:
        raise ValueError(f"{path} lists no image.")
    return found
