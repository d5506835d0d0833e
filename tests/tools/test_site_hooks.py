"""Additions of the hooks to the pages of the documentation site."""

from __future__ import annotations

from types import SimpleNamespace

from mics_fast.options.fields import describe
from tools.site_hooks import on_page_markdown, relink


def page(place: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=place))


def test_the_home_page_is_the_readme_with_links_from_where_it_stands() -> None:
    text = on_page_markdown("<!-- include: README.md -->", page("index.md"))
    assert text.startswith("# mics-fast")
    assert "](guide/install.md)" in text and "](contributing.md)" in text and "](docs/" not in text


def test_a_derivation_stands_below_the_heading_of_its_page() -> None:
    include = "<!-- include: kernels/mics_kernels/evidential/README.md -->"
    text = on_page_markdown(f"# Evidential fusion\n\n{include}", page("operators/evidential.md"))
    assert "\n## Derivation\n" in text and "\n### Fusion\n" in text
    assert "](../performance.md)" in text


def test_a_link_to_a_file_without_a_page_becomes_text() -> None:
    assert relink("see [the licence](../LICENSE)", "docs/method.md", "method.md") == (
        "see the licence"
    )
    outside = "[paper](https://arxiv.org/abs/2509.17492) [below](#limits)"
    assert relink(outside, "docs/method.md", "method.md") == outside


def test_every_option_has_a_row_in_the_tables() -> None:
    text = on_page_markdown("<!-- options -->", page("options.md"))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(describe()) > 50
    assert not [row for row in rows if row.replace("\\|", "").count("|") != 6]
