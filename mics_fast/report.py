"""``python -m mics_fast.report``: a run on one self-contained HTML page."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from mics_fast import figures, pictures
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.data.pipeline import PairBatch
from mics_fast.engine.log import read_log
from mics_fast.errors import InputError, SentenceParser, run_command
from mics_fast.evaluate import SHOWN, Evaluated, compare, evaluate, interval, number, summarise
from mics_fast.figures import Axis, Series
from mics_fast.files import write_text
from mics_fast.intervals import RESAMPLES
from mics_fast.metrics import BINS, risk_coverage
from mics_fast.model_card import NOT_A_DEVICE
from mics_fast.models.sizes import SIZES
from mics_fast.opinions import records
from mics_fast.report_style import STYLE
from mics_fast.run import Run
from mics_fast.trained import best_checkpoint, run_manifest

SCORES = {
    "val_macro_f1": "macro F1 on val",
    "val_accuracy": "accuracy on val",
    "pseudo_accepted": "pseudo-labels accepted",
    "pseudo_accuracy": "accepted ones that are right",
}
CASES = 4
EXAMPLES = 2


@dataclass
class Subject:
    """What the page is about.

    Args:
        run: its folder and options.
        evaluated: the run on the test rows, not calibrated.
        result: its metrics, see ``evaluate.summarise``.
        rival: the run to compare with, evaluated on the same rows; None without one.
        outside: vacuity (N,) of the rows of another distribution; None without them.
    """

    run: Run
    evaluated: Evaluated
    result: dict[str, Any]
    rival: Evaluated | None
    outside: torch.Tensor | None


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
    out.parent.mkdir(parents=True, exist_ok=True)
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


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def text(*sentences: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(' '.join(sentences))}</p>"


def grid(*figure: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figure)}</div>'


def summary(subject: Subject) -> str:
    """The answer in four numbers, and a warning."""
    result = subject.result
    fused = result["views"]["fused"]
    facts = "".join(
        f"<div><dt>{title}</dt><dd>{number(fused[name])}</dd><dd>{bounds}</dd></div>"
        for name, title, bounds in (
            (n, SHOWN[n], f"95 %: {interval(fused['intervals'][n])}")
            for n in ("accuracy", "balanced_accuracy", "macro_auroc", "aurc")
        )
    )
    warning = f'<p class="warning">{escape(NOT_A_DEVICE.replace("**", ""))}</p>'
    virtual = [
        text(f"{name} images are virtual: derived from another modality.")
        for name in result["virtual"]
    ]
    return (
        warning
        + text(
            f"{result['n']} test samples in {result['groups']} groups, {len(result['classes'])} "
            f"classes; checkpoint {best_checkpoint(subject.run).name}. The fused opinion:"
        )
        + f'<dl class="facts">{facts}</dl>'
        + "".join(virtual)
    )


def metrics(subject: Subject) -> str:
    """Every view's metrics, every class's, and the differences to the other run."""
    result = subject.result
    views = result["views"] | {f"no {name}": x for name, x in result["missing"].items()}
    rows = [
        [title, number(views["fused"][name]), interval(views["fused"]["intervals"].get(name))]
        + [number(own[name]) for view, own in views.items() if view != "fused"]
        for name, title in SHOWN.items()
        if name in views["fused"]
    ]
    counts = [str(own["n"]) for own in views.values()]
    rows.append(["n (samples)", counts[0], "", *counts[1:]])
    head = ["metric", "fused", "95 %", *(view for view in views if view != "fused")]
    classes = [
        [label, str(own["n"]), number(own["sensitivity"]),
         interval(own["intervals"]["sensitivity"]), number(own["specificity"]),
         interval(own["intervals"]["specificity"])]
        for label, own in views["fused"]["per_class"].items()
    ]  # fmt: skip
    parts = [
        figures.table(head, rows, "Each view on the samples it sees; "
                      f"intervals: bootstrap, {result['intervals']['resamples']} resamples"),
        figures.table(
            ["class", "n", "sensitivity", "95 %", "specificity", "95 %"], classes,
            "Fused opinion, each class against the rest"),
    ]  # fmt: skip
    if "against" in result:
        differences = [
            [SHOWN[name], f"{x['difference']:+.3f}", interval(x["interval"])]
            for name, x in result["against"]["views"]["fused"].items()
        ]
        parts.append(
            figures.table(["metric", "difference", "95 %"], differences,
                          f"This run minus {result['against']['run']}, same samples (fused)")
        )  # fmt: skip
    return section("Metrics", *parts)


def curves(subject: Subject) -> str:
    """Losses, scores on val, throughput and data-wait of each stage, from ``metrics.jsonl``."""
    log = read_log(subject.run.folder)
    other = read_log(subject.rival.trained.run.folder) if subject.rival else {}
    parts = [
        f"<h3>{escape(stage)}</h3>{grid(*stage_figures(stage, lines, other.get(stage, [])))}"
        for stage, lines in log.items()
    ]
    return section("Training", *parts)


def stage_figures(
    stage: str, lines: Sequence[dict[str, float]], other: Sequence[dict[str, float]]
) -> list[str]:
    """The figures of one stage; ``other``: the same stage of the other run, or nothing."""
    steps = f"optimiser steps of {stage}"
    terms = [name for name in lines[-1] if name == "loss" or name.startswith("loss_")]
    losses = [series(name.removeprefix("loss_"), lines, name) for name in terms]
    accepting = [line for line in lines if line.get("pseudo_accepted")]
    scores = [
        series(title, accepting if name == "pseudo_accuracy" else lines, name)
        for name, title in SCORES.items()
    ]
    if other:
        losses.append(series("loss of the other run", other, "loss"))
        scores.append(series("macro F1 on val, other run", other, "val_macro_f1"))
    drawn = [figures.line_chart(f"{stage}: losses", steps, "loss, unweighted terms", losses)]
    scores = [line for line in scores if line.x]
    if scores:
        title = f"{stage}: scores on val rows and pseudo-labels"
        drawn.append(figures.line_chart(title, steps, "share", scores, y=Axis("share", 0, 1)))
    wait = series("data wait", lines, "data_wait")
    wait = Series(wait.name, wait.x, [100 * share for share in wait.y])
    speed = series("pairs a second", lines, "pairs_per_second")
    return [
        *drawn,
        figures.line_chart(f"{stage}: throughput", steps, "pairs a second", [speed]),
        figures.line_chart(f"{stage}: time that waited for data", steps, "data wait, %", [wait]),
    ]


def series(title: str, lines: Sequence[dict[str, float]], name: str) -> Series:
    """One logged value over the steps at which it was logged."""
    there = [line for line in lines if name in line]
    return Series(title, [line["step"] for line in there], [line[name] for line in there])


def confusion(subject: Subject) -> str:
    """Counts of the fused answers."""
    fused = subject.result["views"]["fused"]
    return section(
        "Confusion matrix",
        figures.confusion_table(
            fused["confusion"], subject.result["classes"],
            "Fused answers: number of samples; shade: share of the row",
        ),
    )  # fmt: skip


def certainty(subject: Subject) -> str:
    """Calibration, selective prediction, and vacuity of right, wrong and foreign samples."""
    views = subject.evaluated.opinions.each()
    fused = views["fused"]
    right = fused.wrong() == 0
    drawn = [
        figures.reliability_diagram(
            "Reliability of the fused probabilities", fused.probability.amax(1).numpy(),
            right.float().numpy(), BINS,
        ),
        risk_figure(subject),
        figures.histogram(
            "Uncertainty of right and wrong answers", "uncertainty (vacuity), fused",
            {"right": fused.uncertainty[right].tolist(),
             "wrong": fused.uncertainty[~right].tolist()},
        ),
    ]  # fmt: skip
    note = ""
    if subject.outside is None:
        note = text("No manifest of another distribution was given (--out-of-distribution).")
    else:
        drawn.append(
            figures.histogram(
                "Uncertainty in and out of distribution", "uncertainty (vacuity), fused",
                {"test samples": fused.uncertainty.tolist(),
                 "other distribution": subject.outside.tolist()},
            )
        )  # fmt: skip
    return section("Does it know when it is wrong?", grid(*drawn), note)


def risk_figure(subject: Subject) -> str:
    """Error rate over the share answered, most certain first, of every view."""
    lines = []
    for name, view in subject.evaluated.opinions.each().items():
        if len(view.label):
            coverage, risk = risk_coverage(view)
            x, y = (100 * coverage).tolist(), (100 * risk).tolist()
            lines.append(Series(f"{name} (n = {len(view.label)})", x, y))
    if subject.rival:
        coverage, risk = risk_coverage(subject.rival.opinions.fused())
        lines.append(Series("fused, other run", (100 * coverage).tolist(), (100 * risk).tolist()))
    return figures.line_chart(
        "Risk and coverage: answering only the most certain samples", "samples answered, %",
        "wrong among them, %", lines, x=Axis("samples answered, %", 0, 100),
        y=Axis("wrong among them, %", 0, 100),
    )  # fmt: skip


def features(subject: Subject) -> str:
    """The features the last view's head reads, on their two strongest directions."""
    trained, rows = subject.evaluated.trained, subject.evaluated.rows
    read, opinions = pictures.collect_features(trained.model, trained.loader(rows))
    there = opinions.present[:, -1]
    if there.sum() < 3:
        return section("Features", text("Fewer than three samples have this view."))
    points, share = pictures.principal_components(read[there])
    figure = figures.scatter(
        f"Features of the {trained.views[-1]} view by class",
        f"first principal component ({share[0]:.0%} of the variance)",
        f"second principal component ({share[1]:.0%})",
        points.numpy(), opinions.label[there].numpy(), trained.classes,
    )  # fmt: skip
    return section("Features", grid(figure))


def reconstructions(subject: Subject) -> str:
    """Image, what the encoder was shown, and what the decoder made of it."""
    run, manifest = subject.run, subject.evaluated.manifest
    try:
        model = pictures.load_pretrained(run, manifest)
    except InputError as error:
        return section("Reconstructions", text(f"Not shown: {error}."))
    if model is None:
        return section("Reconstructions", text("This run started without pre-training."))
    batch = example_batch(subject)
    ratio = run.config.pretrain.mask_ratio
    shown = []
    for column, name in enumerate(manifest.modalities):
        three = pictures.reconstruct(
            model, batch.views[name].cpu(), batch.sample_id.cpu(), ratio, column
        )
        for row, own in enumerate(three):
            if batch.present[row, column]:
                low, high = own.image.min().item(), own.image.max().item()
                sample = subject.evaluated.rows[row].id
                shown.append(
                    strip(f"{name} of {sample}", {
                        kind: pictures.picture(getattr(own, kind), low, high)
                        for kind in ("image", "masked", "predicted")
                    })
                )  # fmt: skip
    return section(
        "Reconstructions",
        text(
            f"{ratio:.0%} of the patches are hidden; the decoder guesses them up to their mean and "
            "contrast, which are shown as they truly are. Colours are scaled to each image."
        ),
        grid(*shown),
    )


def attention(subject: Subject) -> str:
    """Which patches of which modality move the answer."""
    model = subject.evaluated.trained.model
    batch = example_batch(subject)
    weight = pictures.saliency(model, batch, SIZES[subject.run.config.model.size].patch)
    shown = []
    for row in range(len(batch.label)):
        total = sum(own[row].sum().item() for own in weight.values())
        images = {
            f"{name}: {own[row].sum().item() / max(total, 1e-12):.0%}": pictures.overlay(
                batch.views[name][row], own[row]
            )
            for column, (name, own) in enumerate(weight.items())
            if batch.present[row, column]
        }
        shown.append(strip(f"sample {subject.evaluated.rows[row].id}", images))
    return section(
        "Where it looks",
        text(
            "Orange: patches where a small change of the pixels moves the fused answer most "
            "(absolute gradient), scaled to each image. Per cent: the modality's share of all "
            "gradient of the sample."
        ),
        grid(*shown),
    )


def example_batch(subject: Subject) -> PairBatch:
    """The first samples of the test rows."""
    return next(iter(subject.evaluated.trained.loader(subject.evaluated.rows[:EXAMPLES])))


def strip(caption: str, images: dict[str, str]) -> str:
    """Images side by side, each with its own title."""
    cells = "".join(
        f'<div><img src="{uri}" alt="{escape(title)}, {escape(caption)}">'
        f"<span>{escape(title)}</span></div>"
        for title, uri in images.items()
    )
    return (
        f'<figure><div class="strip">{cells}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def cases(subject: Subject) -> str:
    """The samples a person should look at first."""
    fused = subject.evaluated.opinions.fused()
    wrong = fused.wrong().nonzero()[:, 0].tolist()
    order = fused.uncertainty.argsort(descending=True, stable=True).tolist()
    surest_wrong = [row for row in reversed(order) if row in set(wrong)][:CASES]
    parts = [
        "<h3>Most uncertain</h3>",
        grid(*(case(subject, row) for row in order[:CASES])),
        "<h3>Wrong with the least uncertainty</h3>",
        grid(*(case(subject, row) for row in surest_wrong))
        if surest_wrong
        else text("No answer is wrong."),
    ]
    return section("Cases", *parts)


def case(subject: Subject, position: int) -> str:
    """The images of one sample, what was answered, and the belief of every view."""
    row: Row = subject.evaluated.rows[position]
    classes = subject.evaluated.trained.classes
    (record,) = records(subject.evaluated.opinions.row(position), [row.id], classes)
    images = {
        f"virtual {name}" if name in row.virtual else name: pictures.thumbnail(file)
        for name, file in row.files.items()
        if file is not None
    }
    views = {"fused": record, **record["views"]}
    belief = {
        name: {**said["belief"], "uncommitted": said["uncertainty"]} for name, said in views.items()
    }
    truth = classes[row.label]
    title = (
        f"{row.id}: answered {record['class']}, truth {truth}; uncertainty "
        f"{record['uncertainty']:.2f}, conflict {record['conflict']:.2f}"
    )
    return (
        f'<article class="case"><h4>{escape(title)}</h4>{strip(f"frames of {row.id}", images)}'
        + figures.belief_table(belief, truth, "Belief of each view; uncommitted = uncertainty")
        + "</article>"
    )


def settings(subject: Subject) -> str:
    """The options of the run, the data, and what this page was made with."""
    manifest: Manifest = subject.evaluated.manifest
    splits = [row.split for row in manifest.rows]
    environment = [
        ["rows of the manifest", str(len(manifest.rows))],
        *([f"{name} rows", str(splits.count(name))] for name in ("train", "val", "test")),
        ["labelled train rows", str(len(manifest.select("train", labelled=True)))],
        ["python", platform.python_version()],
        ["torch", torch.__version__],
        ["device of this evaluation", str(subject.evaluated.trained.device)],
    ]
    options = (subject.run.folder / "config.yaml").read_text()
    return section(
        "Configuration and environment",
        figures.table(["what", "value"], environment, "Data, and the machine that made this page"),
        f"<details><summary>All options of the run</summary><pre>{escape(options)}</pre></details>",
    )


if __name__ == "__main__":
    run_command(main)
