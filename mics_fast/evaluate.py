"""``python -m mics_fast.evaluate``: how good a run is, for each modality alone, fused, and with a
modality missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import InputError, SentenceParser, run_command
from mics_fast.common.files import write_csv, write_json
from mics_fast.evaluation.intervals import RESAMPLES
from mics_fast.evaluation.tables import print_tables
from mics_fast.inference.evaluated import (
    add_out_of_distribution,
    compare,
    evaluate,
    opinion_table,
    summarise,
)
from mics_fast.inference.run_model import run_manifest
from mics_fast.training.run import Run


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run folder; print tables and, where asked, write JSON and CSV."""
    options = parse(arguments)
    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    evaluated = evaluate(run, manifest, options.split, options.calibrate)
    result = summarise(evaluated, options.split, options.resamples)
    if options.out_of_distribution:
        add_out_of_distribution(result, evaluated, options.out_of_distribution)
    if options.against:
        rival = Run.open(options.against)
        other = run_manifest(rival, options.manifest or manifest.path)
        against = evaluate(rival, other, options.split, options.calibrate)
        result["against"] = compare(evaluated, against, options.resamples)
    print_tables(result)
    if options.json:
        write_json(options.json, result)
    if options.csv:
        write_csv(options.csv, opinion_table(evaluated))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: an option is unknown, ill-typed or out of range.
    """
    parser = SentenceParser(prog="python -m mics_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--manifest", type=Path, help="default: the run's own")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    parser.add_argument("--csv", type=Path, help="write every row's opinions to this file")
    parser.add_argument("--against", type=Path, metavar="RUN",
                        help="another run: differences on the same rows")  # fmt: skip
    parser.add_argument("--out-of-distribution", type=Path, metavar="MANIFEST",
                        help="images the model should be unsure of")  # fmt: skip
    parser.add_argument("--calibrate", choices=("temperature", "evidence"),
                        help="fit this on the val rows first")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    options = parser.parse_args(arguments)
    if options.resamples < 1:
        raise InputError(f"--resamples is {options.resamples}, wanted at least 1")
    return options


if __name__ == "__main__":
    run_command(main)
