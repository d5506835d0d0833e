"""``python -m mics_fast.experiment``: measure which parts of the method help, over several seeds.

One command trains every variant of the method for every seed and label fraction on the splits of
one manifest, and summarises the results in tables. It can be stopped or killed at any time; the
same command resumes it:

    OUT/seed-0/pretraining/                 shared by all fractions and variants of the seed
    OUT/seed-0/labels-0.05.csv              the manifest with the labels of this draw
    OUT/seed-0/labels-0.05/<variant>/       a run folder, with result.json once evaluated
    OUT/results.json, OUT/results.md        the tables

Variants are paired by seed: they share labels, order and initial weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import InputError, run_command
from mics_fast.common.files import write_json, write_text
from mics_fast.options.commands import parse_experiment


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing parts of the grid, then write and print the tables."""
    train, grid = parse_experiment(arguments, __doc__)
    # torch takes seconds to import; --help and bad options are answered before that.
    from rich.console import Console
    from rich.markdown import Markdown

    from mics_fast.study.experiment import draws, make_cells, missing_tasks, read_result
    from mics_fast.study.processes import run_tasks
    from mics_fast.study.summary import markdown, tabulate

    out = Path(train.out).resolve()
    began = time.monotonic()
    cells = make_cells(train, grid, out)
    for tasks in missing_tasks(cells):
        if not run_tasks(tasks, grid.processes):
            print(f"stopped and saved: the same command resumes, --out {train.out}")
            return
    results = [read_result(cell) for cell in cells]
    try:
        table = tabulate(results, [str(labels) for labels in draws(grid)], grid.variants)
        text = markdown(table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a result of another shape
        raise InputError(f"a result.json below {out} is damaged: {error!r}") from error
    write_json(out / "results.json", table)
    write_text(out / "results.md", text)
    Console().print(Markdown(text))
    minutes = (time.monotonic() - began) / 60
    print(f"wrote {train.out}/results.md and results.json; this call took {minutes:.1f} min")


if __name__ == "__main__":
    run_command(main)
