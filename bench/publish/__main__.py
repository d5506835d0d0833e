"""Write the tables and plots of docs/ from the stored results.

    python -m bench.publish            writes them
    python -m bench.publish --check    fails if one differs from the results

A table stands between "<!-- bench: NAME -->" and "<!-- bench: end -->". It is unchanged as long as
its subject has no stored result.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

from bench.machine import ROOT
from bench.publish import reports, summaries
from bench.publish.plots import draw, stale_plots
from bench.publish.results import Result, stored

FILES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(<!-- bench: (?!end)([\w -]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[list[Result]], str | None]] = {
    "evidential": summaries.evidential,
    "consistency": summaries.consistency,
    "shift": summaries.shift,
    "features": summaries.features,
    "pipeline": summaries.pipeline,
    "as called": summaries.as_called,
    "training": reports.training,
    "host": reports.host,
    "work": reports.work,
    "targets": reports.targets,
    "plots": reports.shown,
    "kernels": reports.kernels,
    **{
        f"all {name}": partial(reports.everything, name)
        for name in ("evidential", "consistency", "shift")
    },
}


def filled(text: str, results: list[Result]) -> str:
    """Replace the tables in a document."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise SystemExit(f"there is no table named {match[2]!r}; there are {', '.join(BLOCKS)}")
        content = BLOCKS[match[2]](results)
        return match[0] if content is None else f"{match[1]}{content}{match[3]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Write everything, or report stale parts; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = stored()
    stale = stale_plots(results) if check else []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text()
        new = filled(text, results)
        if new != text and check:
            stale.append(name)
        elif new != text:
            path.write_text(new)
            print(f"wrote {name}")
    if not check:
        draw(results)
        return 0
    for name in stale:
        print(f"{name} differs from bench/results: run python -m bench.publish")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
