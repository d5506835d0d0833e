"""``python -m mics_fast.evaluate``: measure each modality, their fusion, and each one missing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mics_fast.common.anonymity import read_key
from mics_fast.common.errors import InputError, SentenceParser, run_command, warn
from mics_fast.common.files import STANDARD_OUTPUT, finite, write_csv, write_json
from mics_fast.evaluation import CRITERIA, RESAMPLES

if TYPE_CHECKING:
    from mics_fast.inference.assessment import Assessment


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run folder; print tables, and write JSON and CSV on request."""
    options = parse(arguments)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.evaluation.referral import Target
    from mics_fast.evaluation.results import without_paths
    from mics_fast.evaluation.tables import print_tables
    from mics_fast.inference.assessment import (
        add_out_of_distribution,
        anonymised,
        assess,
        choose_point,
        choose_prediction_sets,
        compare,
        opinion_table,
        summarise,
    )
    from mics_fast.inference.run_classifier import best_checkpoint, run_manifest
    from mics_fast.inference.stored_point import store_point
    from mics_fast.training.run import Run

    key = read_key(options.anonymise) if options.anonymise else None
    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    assessment = assess(run, manifest, options.split, options.calibrate, options.flips)
    warn_of_training(assessment)
    evaluation = summarise(assessment, options.resamples)
    target = Target(options.target_risk, options.confidence) if options.target_risk else None
    evaluation.point, evaluation.referrals = choose_point(
        assessment, target, options.refer_by, options.resamples
    )
    evaluation.sets = choose_prediction_sets(assessment, options.set_coverage, options.resamples)
    rule = None if evaluation.sets is None else evaluation.sets.rule
    evaluation.point = replace(evaluation.point, sets=rule)
    if assessment.classifier.point.rule and not evaluation.point.rule:
        warn(
            "warning: the referral rule of the run was chosen under another calibration and is "
            "dropped: choose it again with --target-risk"
        )
    if target or options.calibrate or options.set_coverage or options.flips is not None:
        file = store_point(run.folder, best_checkpoint(run), evaluation.point)
        print(f"wrote {file}: predict, report and export use it", file=sys.stderr)
    if options.out_of_distribution:
        add_out_of_distribution(evaluation, assessment, options.out_of_distribution)
    if options.against:
        rival = Run.open(options.against)
        other = run_manifest(rival, options.manifest or manifest.path)
        against = assess(rival, other, options.split, options.calibrate, options.flips)
        evaluation.against = compare(assessment, against, options.resamples)
    if key:
        evaluation = without_paths(evaluation)
    if options.json == STANDARD_OUTPUT:
        print(json.dumps(finite(evaluation.json()), indent=1))
    else:
        print_tables(evaluation)
    if options.json and options.json != STANDARD_OUTPUT:
        write_json(options.json, evaluation.json())
    if options.csv:
        write_csv(options.csv, opinion_table(anonymised(assessment, key)))


def warn_of_training(assessment: Assessment) -> None:
    """Warn on stderr if the run was trained on rows that are now scored."""
    from mics_fast.inference.assessment import trained_on

    seen, count = trained_on(assessment), len(assessment.rows)
    if seen:
        warn(
            f"warning: the run was trained on {len(seen)} of the {count} rows that are scored here "
            "(same id, same image): the figures are too optimistic"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line.

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
    parser.add_argument("--calibrate", choices=("temperature", "evidence", "none"),
                        help="fit this on the val rows and store it in the run")  # fmt: skip
    parser.add_argument(
        "--target-risk",
        type=float,
        metavar="R",
        help="choose on the val rows when to refer to a person, so that at most "
        "this share of all samples is answered and wrong; store it in the run",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="keep the target risk for this share of draws of the val rows; "
        "default: on average over draws",
    )
    parser.add_argument("--refer-by", choices=CRITERIA, default=CRITERIA[0],
                        help="what is compared with the threshold")  # fmt: skip
    parser.add_argument("--set-coverage", type=float, metavar="C",
                        help="choose on the val rows a set of classes per sample that holds the "
                        "truth this often; store the rule in the run")  # fmt: skip
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction,
                        help="average the opinions on an image and three mirror images of it; "
                        "store that in the run")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples")
    parser.add_argument("--anonymise", type=Path, metavar="KEY_FILE",
                        help="write ids hashed with the key in this file (made if missing), "
                        "and no paths")  # fmt: skip
    options = parser.parse_args(arguments)
    for name in ("target_risk", "confidence", "set_coverage"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {value}, wanted a number between 0 and 1")
    if options.confidence and not options.target_risk:
        raise InputError("--confidence is given without --target-risk, which it belongs to")
    if options.resamples < 1:
        raise InputError(f"--resamples is {options.resamples}, wanted at least 1")
    return options


if __name__ == "__main__":
    run_command(main)
