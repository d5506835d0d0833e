"""``python -m mics_fast.evaluate``: measure a run on each modality, fused, and without each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import InputError, SentenceParser, run_command
from mics_fast.common.files import STANDARD_OUTPUT, finite, write_csv, write_json
from mics_fast.evaluation import RESAMPLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run folder; print tables, and write JSON and CSV if asked."""
    options = parse(arguments)
    # torch takes seconds to import: --help and mistyped options do not wait for it.
    from mics_fast.evaluation.tables import print_tables
    from mics_fast.inference.assessment import (
        add_out_of_distribution,
        assess,
        compare,
        opinion_table,
        summarise,
    )
    from mics_fast.inference.run_classifier import run_manifest
    from mics_fast.training.run import Run

    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    assessment = assess(run, manifest, options.split, options.calibrate)
    evaluation = summarise(assessment, options.resamples)
    if options.out_of_distribution:
        add_out_of_distribution(evaluation, assessment, options.out_of_distribution)
    if options.against:
        rival = Run.open(options.against)
        other = run_manifest(rival, options.manifest or manifest.path)
        against = assess(rival, other, options.split, options.calibrate)
        evaluation.against = compare(assessment, against, options.resamples)
    if options.json == STANDARD_OUTPUT:
        print(json.dumps(finite(evaluation.json()), indent=1))
    else:
        print_tables(evaluation)
    if options.json and options.json != STANDARD_OUTPUT:
        write_json(options.json, evaluation.json())
    if options.csv:
        write_csv(options.csv, opinion_table(assessment))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: an option is unknown, ill-typed or out of range.
    """
    parser = SentenceParser(prog="python -m mics_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--manifest", type=Path, help="default: the run's own")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write the metrics to this file; - is standard output")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the opinions on every row")
    parser.add_argument("--against", type=Path, metavar="RUN",
                        help="compare with another run on the same rows")  # fmt: skip
    parser.add_argument("--out-of-distribution", type=Path, metavar="MANIFEST",
                        help="rows that the model should be unsure of")  # fmt: skip
    parser.add_argument("--calibrate", choices=("temperature", "evidence"),
                        help="fit this on the val rows first")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples")
    options = parser.parse_args(arguments)
    if options.resamples < 1:
        raise InputError(f"--resamples is {options.resamples}, wanted at least 1")
    return options


if __name__ == "__main__":
    run_command(main)
