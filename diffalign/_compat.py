"""Dated repairs of the libraries below, each with its reason; everything else in the package is free of them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from typing import Any, Literal

_libraries: list[Any] = []  # torch drops the schemas of a Library that is collected


@functools.cache
def ensure_torchvision() -> Literal["absent", "native", "repaired"]:
    """Makes an installed torchvision importable beside a torch without CUDA. Call it before diffusers or transformers.

    The torchvision wheel of PyPI is built for CUDA (0.28.0, November 2026). Beside a CPU torch its compiled part fails
    to load, the import ends with `operator torchvision::nms does not exist`, and transformers, peft, diffusers, timm
    and open_clip, which see it as installed, die with it. Its Python part, the transforms, needs only the two schemas
    that are declared here. What stays missing is box suppression, video and its own image files: none is used here.

    Returns:
        "absent": not installed, which all but open_clip and timm are content with; "native": it works as it is;
        "repaired": it works because of the declared schemas.
    """
    if importlib.util.find_spec("torchvision") is None:
        # transformers 5 says twice, as diffusers is imported, that it takes Pillow instead, which is what we want.
        logging.getLogger("transformers.utils.import_utils").addFilter(_is_news)
        return "absent"
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return "native"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    from torch.library import Library

    library = Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    importlib.import_module("torchvision")
    return "repaired"


def _is_news(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()
