"""``python -m mics_fast.report``: a run on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mics_fast.data.manifest import read_manifest
from mics_fast.errors import SentenceParser
from mics_fast.evaluate import compare, evaluate, summarise
from mics_fast.files import make_folder, write_text
from mics_fast.intervals import RESAMPLES
from mics_fast.report.images import attention, cases, features, reconstructions
from mics_fast.report.numbers import certainty, confusion, curves, metrics, settings, summary
from mics_fast.report.parts import Subject
from mics_fast.report.style import STYLE
from mics_fast.run import Run
from mics_fast.trained import run_manifest


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
    run = Run.open(options.run)
    manifest = run_manifest(run, options.manifest)
    evaluated = evaluate(run, manifest, "test")
    result = summarise(evaluated, "test", options.resamples)
    rival = None
    if options.against:
        other = Run.open(options.against)
        rival = evaluate(other, run_manifest(other, manifest.path), "test")
        result["against"] = compare(evaluated, rival, options.resamples)
    outside = None
    if options.out_of_distribution:
        rows = read_manifest(options.out_of_distribution, manifest.modalities).rows
        outside = evaluated.trained.opinions(rows, "out of distribution").fused().uncertainty
    out = options.out or run.folder / "report" / "report.html"
    make_folder(out.parent)
    write_text(out, page(Subject(run, evaluated, result, rival, outside)))
    print(f"wrote {out}")


def page(subject: Subject) -> str:
    """The whole document; the policy in its head forbids every request."""
    name = escape(subject.run.folder.resolve().name)
    sections = (
        summary(subject), metrics(subject), curves(subject), confusion(subject),
        certainty(subject), features(subject), reconstructions(subject), attention(subject),
        cases(subject), settings(subject),
    )  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f'<title>Report: {name}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"</head><body><main><h1>Report: {name}</h1>{''.join(sections)}</main></body></html>\n"
    )
