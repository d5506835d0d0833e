"""``python -m mics_fast.experiment``: measure which parts of the method help, over several seeds.

One command trains every variant of the method for every seed and label fraction on the splits of
one manifest, and summarises the results in tables. It can be stopped or killed at any time; the
same command resumes it:

    OUT/seed-0/pretraining/                 shared by all fractions and variants of the seed
    OUT/seed-0/labels-0.05.csv              the manifest with the labels of this draw
    OUT/seed-0/labels-0.05/<variant>/       a run folder, with result.json once evaluated
    OUT/results.json, OUT/results.md        the tables

Variants are paired by seed: they share labels, order and initial weights.

With ``--experiment.folds DIR`` it cross-validates instead: one run per fold of ``prepare --folds``
in OUT/fold-1 and so on, then OUT/results.json and OUT/report.html on the pooled opinions.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mics_fast.common.errors import InputError, run_command
from mics_fast.common.files import write_json, write_text
from mics_fast.evaluation import RESAMPLES
from mics_fast.options.commands import parse_experiment

if TYPE_CHECKING:
    from mics_fast.options import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write and print the tables."""
    train, grid = parse_experiment(arguments, __doc__)
    if grid.folds:
        cross_validate(train, Path(grid.folds), grid.processes)
        return
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.evaluation.tables import wide_console
    from mics_fast.study.experiment import draws, make_cells, missing_tasks, read_result
    from mics_fast.study.processes import run_tasks
    from mics_fast.study.summary import Summary, markdown, tabulate

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
    wide_console().print(Summary(text))
    minutes = (time.monotonic() - began) / 60
    print(f"wrote {train.out}/results.md and results.json; this call took {minutes:.1f} min")


def cross_validate(train: TrainConfig, folder: Path, processes: int) -> None:
    """Train the missing folds, then pool their opinions into one table and one report."""
    from mics_fast.evaluation.tables import print_tables, table_of, wide_console
    from mics_fast.reporting.cross_validation import pooled_page
    from mics_fast.reporting.parts import Subject
    from mics_fast.study.cross_validation import (
        FOLD_COLUMNS,
        assess_folds,
        fold_rows,
        make_folds,
        missing_folds,
        pool,
        summarise_folds,
    )
    from mics_fast.study.processes import run_tasks

    out = Path(train.out).resolve()
    folds = make_folds(train, folder, out)
    if not run_tasks(missing_folds(folds), processes):
        print(f"stopped and saved: the same command goes on, --out {train.out}")
        return
    assessments = assess_folds(folds)
    pooled = pool(assessments)
    evaluation, rows = summarise_folds(pooled, RESAMPLES), fold_rows(folds, assessments)
    per_fold = [dict(zip(FOLD_COLUMNS, row, strict=True)) for row in rows]
    write_json(out / "results.json", {**evaluation.json(), "folds": per_fold})
    # Each case was judged by the run of its fold: the first one does not explain it.
    subject = Subject(pooled.classifier.run, pooled, evaluation, None, None, explains=False)
    write_text(out / "report.html", pooled_page(subject, out.name, FOLD_COLUMNS, rows))
    print_tables(evaluation)
    wide_console().print(table_of(FOLD_COLUMNS, rows, "each run on its own test rows, fused"))
    print(f"wrote {train.out}/results.json and report.html")
    runs = shlex.join(f"{train.out}/{fold.name}" for fold in folds)
    print(f"next: mics-fast predict {runs} --folder IMAGES  # all runs as one")


if __name__ == "__main__":
    run_command(main)
