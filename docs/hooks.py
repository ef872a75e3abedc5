"""What mkdocs is asked to do beside its own: parts of the repository's texts, and equations that need no network."""

from __future__ import annotations

import html
import posixpath
import re
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Without a font that has tables for mathematics, which few systems bring, browsers put subscripts on the line; ziamath
# ships one, under the SIL Open Font License.
TAKEN = {
    **{f"assets/demo/{path.name}": path for path in sorted((ROOT / "assets/demo").glob("*.png"))},
    "fonts/STIXTwoMath-Regular.ttf": package_files("ziamath") / "fonts/STIXTwoMath-Regular.ttf",
}
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}

INCLUDE = re.compile(r"^<!-- include ([\w./-]+)(?: # (.+))? -->$", re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:)([^)\s#]+)\)")
EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Takes pictures and the font from where they lie."""
    for uri, path in TAKEN.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Puts `<!-- include FILE # SECTION -->` in: the section of that heading, or the whole file without its title."""

    def included(match: re.Match[str]) -> str:
        text = section((ROOT / match[1]).read_text(encoding="utf-8"), match[2])
        here = posixpath.dirname(page.file.src_uri)

        def linked(link: re.Match[str]) -> str:
            """A link to a page or a picture of the site, seen from this page; of any other file only the words."""
            target = PAGES.get(link[2], link[2])
            if files.get_file_from_path(target) is None:
                return link[1].lstrip("!")[1:-1]
            return f"{link[1]}({posixpath.relpath(target, here or '.')})"

        return LINK.sub(linked, text)

    return INCLUDE.sub(included, markdown)


def section(text: str, heading: str | None) -> str:
    """What stands under a heading, or under a line of a module's docstring, to the next heading or to its end."""
    body = re.sub(r"^```python no-run$", "```python", text, flags=re.MULTILINE)
    if heading is None:
        return body.partition("\n")[2]
    found = re.search(rf"^(?:#+ )?{re.escape(heading)}\n(.*?)(?=^## |^\"\"\"|\Z)", body, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(f"no heading {heading!r}")
    return found[1].strip()


def on_page_content(content: str, **_: Any) -> str:
    """Turns the equations that arithmatex found into MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match["latex"]).strip(), display="inline" if match["tag"] == "span" else "block")

    return EQUATION.sub(drawn, content)
