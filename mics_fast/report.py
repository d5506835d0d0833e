"""``python -m mics_fast.report``: write a run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.anonymity import read_key
from mics_fast.common.errors import SentenceParser, run_command
from mics_fast.common.files import make_folder, write_text
from mics_fast.evaluation import CRITERIA, RESAMPLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the run and write the page."""
    parser = SentenceParser(prog="python -m mics_fast.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--against", type=Path, metavar="RUN", help="compare with another run")
    parser.add_argument("--out", type=Path, help="default: RUN/report/report.html")
    parser.add_argument("--manifest", type=Path, help="default: the run's own")
    parser.add_argument("--out-of-distribution", type=Path, metavar="MANIFEST",
                        help="rows that the model should be unsure of")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples")
    parser.add_argument("--anonymise", type=Path, metavar="KEY_FILE",
                        help="show ids hashed with the key in this file (made if it is not there), "
                        "no paths and no frames")  # fmt: skip
    parser.add_argument("--frames", action="store_true",
                        help="show frames, reconstructions and saliency although --anonymise is "
                        "given; frames may show burned-in names")  # fmt: skip
    options = parser.parse_args(arguments)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.data.manifest import read_manifest
    from mics_fast.evaluation.opinions import FUSED
    from mics_fast.evaluation.results import without_paths
    from mics_fast.inference.assessment import (
        anonymised,
        assess,
        choose_point,
        choose_prediction_sets,
        compare,
        summarise,
    )
    from mics_fast.inference.run_classifier import run_manifest
    from mics_fast.reporting.page import page
    from mics_fast.reporting.parts import Subject
    from mics_fast.training.run import Run

    key = read_key(options.anonymise) if options.anonymise else None
    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    assessment = assess(run, manifest, "test")
    evaluation = summarise(assessment, options.resamples)
    evaluation.point, evaluation.referrals = choose_point(
        assessment, None, CRITERIA[0], options.resamples
    )
    evaluation.sets = choose_prediction_sets(assessment, None, options.resamples)
    rival = None
    if options.against:
        other = Run.open(options.against)
        rival = assess(other, run_manifest(other, manifest.path), "test")
        evaluation.against = compare(assessment, rival, options.resamples)
    outside = None
    if options.out_of_distribution:
        rows = read_manifest(options.out_of_distribution, manifest.modalities).rows
        opinions = assessment.classifier.opinions(rows, "out of distribution")
        outside = assessment.predictions(opinions)[FUSED].uncertainty
    out = options.out or run.folder / "report" / "report.html"
    make_folder(out.parent)
    subject = Subject(run, assessment, evaluation, rival, outside)
    if key:
        subject.assessment = anonymised(assessment, key)
        subject.evaluation = without_paths(evaluation)
        subject.paths, subject.frames = False, options.frames
    write_text(out, page(subject))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
