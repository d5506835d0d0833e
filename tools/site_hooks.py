"""Hooks of ``mkdocs.yml``: include files from outside docs/, and insert the table of options.

``<!-- include: PATH -->`` in a page is replaced by that file, relative to the repository, and
``<!-- options -->`` by a table of all options. Links are written for readers of the repository, so
a link to a file outside docs/ is redirected to the page that includes the file, or becomes plain
text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mics_fast.options.fields import describe

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
OPTIONS = "<!-- options -->"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
# Files outside docs/ -> the pages that include them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the markers of a page; called by mkdocs."""
    place = page.file.src_uri
    markdown = relink(markdown, f"docs/{place}", place)

    def include(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        if posixpath.dirname(match[1]):
            # A derivation becomes a section of the page, whose title it shares.
            text = re.sub(r"^#", "##", text, flags=re.MULTILINE)
            text = re.sub(r"\A## .*", "## Derivation", text)
        return relink(text, match[1], place)

    markdown = INCLUDE.sub(include, markdown)
    if OPTIONS in markdown:
        markdown = markdown.replace(OPTIONS, option_tables())
    return markdown


def relink(text: str, source: str, place: str) -> str:
    """Adapt relative links to the page at ``place`` below docs/.

    Args:
        text: Markdown.
        source: the text's file, relative to the repository.
        place: the page, relative to docs/.
    """

    def link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        if not path.startswith("docs/"):
            return words
        relative = posixpath.relpath(path, posixpath.join("docs", posixpath.dirname(place)))
        return f"{mark}[{words}]({relative}{anchor})"

    return LINK.sub(link, text)


def option_tables() -> str:
    """Make a table of options for each part of the configuration."""
    parts: dict[str, list[str]] = {}
    for option in describe():
        meaning = option.text if not option.range else f"{option.text} ({option.range})"
        default = f"`{option.default}`" if option.default else ""
        cells = [meaning, default, option.type, option.source]
        words = " | ".join(cell.replace("|", "\\|").replace("[", "\\[") for cell in cells)
        part, _, name = option.name.rpartition(".")
        parts.setdefault(part, []).append(f"| `{name}` | {words} |")
    head = "| option | meaning, range | default | type | source |\n" + "| --- " * 5 + "|\n"
    return "\n\n".join(
        f"## {part or 'The run'}\n\n{head}" + "\n".join(lines) for part, lines in parts.items()
    )
