"""The sections of the report that come from numbers: metrics, curves, calibration, options."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from html import escape

import torch

from mics_fast.data.manifest import SPLITS, Manifest
from mics_fast.engine.log import read_log
from mics_fast.evaluation.metrics import BINS, risk_coverage
from mics_fast.evaluation.opinions import FUSED
from mics_fast.evaluation.tables import (
    CLASS_COLUMNS,
    DIFFERENCE_COLUMNS,
    SHOWN,
    class_rows,
    difference_rows,
    interval,
    metric_rows,
    number,
    shown_columns,
)
from mics_fast.inference.model_card import NOT_A_DEVICE
from mics_fast.inference.run_classifier import best_checkpoint
from mics_fast.reporting import figures
from mics_fast.reporting.figures import Axis, Series
from mics_fast.reporting.parts import Subject, grid, section, text

SCORES = {
    "val_macro_f1": "macro F1 on val",
    "val_accuracy": "accuracy on val",
    "pseudo_accepted": "pseudo-labels accepted",
    "pseudo_accuracy": "accepted ones that are right",
}


def summary(subject: Subject) -> str:
    """The answer in four numbers, and a warning."""
    evaluation = subject.evaluation
    fused = evaluation.fused
    facts = "".join(
        f"<div><dt>{title}</dt><dd>{number(fused.values[name])}</dd><dd>{bounds}</dd></div>"
        for name, title, bounds in (
            (n, SHOWN[n], f"95 %: {interval(fused.intervals[n])}")
            for n in ("accuracy", "balanced_accuracy", "macro_auroc", "aurc")
        )
    )
    warning = f'<p class="warning">{escape(NOT_A_DEVICE.replace("**", ""))}</p>'
    virtual = [
        text(f"{name} images are virtual: derived from another modality.")
        for name in evaluation.virtual
    ]
    return (
        warning
        + text(
            f"{evaluation.n} test samples in {evaluation.groups} groups, {len(evaluation.classes)} "
            f"classes; checkpoint {best_checkpoint(subject.run).name}. The fused opinion:"
        )
        + f'<dl class="facts">{facts}</dl>'
        + "".join(virtual)
    )


def metrics(subject: Subject) -> str:
    """Every view's metrics, every class's, and the differences to the other run."""
    evaluation = subject.evaluation
    columns = shown_columns(evaluation)
    counts = [str(own.n) for own in columns.values()]
    rows = [*metric_rows(columns), ["n (samples)", counts[0], "", *counts[1:]]]
    head = ["metric", "fused", "95 %", *list(columns)[1:]]
    parts = [
        figures.table(head, rows, "Each opinion on the samples it sees; "
                      f"intervals: bootstrap, {evaluation.resamples} resamples"),
        figures.table(
            CLASS_COLUMNS, class_rows(evaluation.fused),
            "Fused opinion, each class against the rest"),
    ]  # fmt: skip
    if evaluation.against:
        parts.append(
            figures.table(DIFFERENCE_COLUMNS, difference_rows(evaluation.against),
                          f"This run minus {evaluation.against.run}, same samples (fused)")
        )  # fmt: skip
    return section("Metrics", *parts)


def curves(subject: Subject) -> str:
    """Losses, scores on val, throughput and data-wait of each stage, from ``metrics.jsonl``."""
    log = read_log(subject.run.folder)
    other = read_log(subject.rival.classifier.run.folder) if subject.rival else {}
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
    return section(
        "Confusion matrix",
        figures.confusion_table(
            subject.evaluation.fused.confusion, subject.evaluation.classes,
            "Fused answers: number of samples; shade: share of the row",
        ),
    )  # fmt: skip


def certainty(subject: Subject) -> str:
    """Calibration, selective prediction, and vacuity of right, wrong and foreign samples."""
    fused = subject.assessment.predictions()[FUSED]
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
    for source, own in subject.assessment.predictions().items():
        if not source.missing:
            coverage, risk = risk_coverage(own)
            x, y = (100 * coverage).tolist(), (100 * risk).tolist()
            lines.append(Series(f"{source.name} (n = {len(own)})", x, y))
    if subject.rival:
        coverage, risk = risk_coverage(subject.rival.predictions()[FUSED])
        lines.append(Series("fused, other run", (100 * coverage).tolist(), (100 * risk).tolist()))
    return figures.line_chart(
        "Risk and coverage: answering only the most certain samples", "samples answered, %",
        "wrong among them, %", lines, x=Axis("samples answered, %", 0, 100),
        y=Axis("wrong among them, %", 0, 100),
    )  # fmt: skip


def settings(subject: Subject) -> str:
    """The options of the run, the data, and what this page was made with."""
    manifest: Manifest = subject.assessment.manifest
    splits = [row.split for row in manifest.rows]
    environment = [
        ["rows of the manifest", str(len(manifest.rows))],
        *([f"{name} rows", str(splits.count(name))] for name in SPLITS),
        ["labelled train rows", str(len(manifest.select("train", labelled=True)))],
        ["python", platform.python_version()],
        ["torch", torch.__version__],
        ["device of this evaluation", str(subject.assessment.classifier.device)],
    ]
    options = (subject.run.folder / "config.yaml").read_text()
    return section(
        "Configuration and environment",
        figures.table(["what", "value"], environment, "Data, and the machine that made this page"),
        f"<details><summary>All options of the run</summary><pre>{escape(options)}</pre></details>",
    )
