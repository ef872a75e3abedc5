"""The versions of the libraries that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Name -> version of Python and of each library that is installed; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # diffalign itself, run from a checkout that was not installed
            continue
    return found
