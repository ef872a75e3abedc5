"""Docstrings as the API pages want them: Markdown, where the code has a few marks of reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EQUATION = re.compile(r"^\.\. math::[ \n]*(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|meth|func|mod|attr):`")
LIST = re.compile(r"^((?!- |\s).+\n)(?=- )", re.MULTILINE)


class Docstrings(Extension):
    """Equations between dollars, roles as plain code, a blank line before a list."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = EQUATION.sub(lambda match: f"$$\n{match[1].strip()}\n$$\n\n", obj.docstring.value)
        obj.docstring.value = LIST.sub(r"\1\n", ROLE.sub("`", text))
