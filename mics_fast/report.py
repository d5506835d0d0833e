"""``python -m mics_fast.report``: a run on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mics_fast.common.errors import SentenceParser, run_command
from mics_fast.common.files import make_folder, write_text
from mics_fast.evaluation import RESAMPLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the run, draw the page, write it."""
    parser = SentenceParser(prog="python -m mics_fast.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--against", type=Path, metavar="RUN", help="compare with another run")
    parser.add_argument("--out", type=Path, help="default: RUN/report/report.html")
    parser.add_argument("--manifest", type=Path, help="default: the run's own")
    parser.add_argument("--out-of-distribution", type=Path, metavar="MANIFEST",
                        help="images the model should be unsure of")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    options = parser.parse_args(arguments)
    # torch takes seconds to import: --help and mistyped options do not wait for it.
    from mics_fast.data.manifest import read_manifest
    from mics_fast.evaluation.opinions import FUSED
    from mics_fast.inference.assessment import assess, compare, summarise
    from mics_fast.inference.run_classifier import run_manifest
    from mics_fast.reporting.page import page
    from mics_fast.reporting.parts import Subject
    from mics_fast.training.run import Run

    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    assessment = assess(run, manifest, "test")
    evaluation = summarise(assessment, options.resamples)
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
    write_text(out, page(Subject(run, assessment, evaluation, rival, outside)))
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
