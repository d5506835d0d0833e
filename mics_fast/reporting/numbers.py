"""Sections of the report made of numbers: metrics, curves, calibration, referral, options."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from html import escape

import torch
from torchmetrics.functional.classification import binary_roc

from mics_fast.data.manifest import SPLITS, Manifest
from mics_fast.engine.log import read_log
from mics_fast.evaluation.metrics import BINS, risk_coverage
from mics_fast.evaluation.opinions import FUSED
from mics_fast.evaluation.referral import Rule, referral_values
from mics_fast.evaluation.results import Evaluation
from mics_fast.evaluation.tables import (
    CLASS_COLUMNS,
    DIFFERENCE_COLUMNS,
    REFERRAL_COLUMNS,
    SHOWN,
    class_rows,
    difference_rows,
    guarantee,
    interval,
    metric_rows,
    number,
    referral_rows,
    referral_sentence,
    set_sentence,
    shown_columns,
)
from mics_fast.inference.model_card import NOT_A_DEVICE
from mics_fast.inference.run_classifier import best_checkpoint
from mics_fast.options.parsing import as_yaml
from mics_fast.reporting import figures
from mics_fast.reporting.figures import Axis, Series
from mics_fast.reporting.parts import Subject, grid, section, tables, text
from mics_fast.training.run import with_paths

MEANINGS = {
    "sensitivity, specificity": "share of a class that is found; share of the rest that is not "
    "taken for it",
    "balanced accuracy": "mean sensitivity over the classes",
    "macro F1, AUROC, AUPRC": "means over classes of the F1 score and of the areas under the ROC "
    "and precision-recall curves; 0.5 is chance for AUROC",
    "Cohen's kappa, MCC": "agreement beyond chance; 0 is chance, 1 is perfect",
    "ECE, Brier score, NLL": "how far probabilities are from reality; 0 is best",
    "uncertainty (vacuity)": "belief that is committed to no class, 0 to 1",
    "conflict": "how much the opinions of the modalities contradict each other, 0 to 1",
    "AURC": "mean error rate if only the most certain samples are answered, over all shares "
    "answered; 0 is best",
    "covered at 5 % risk": "largest share of samples, most certain first, with at most 5 % errors",
    "PPV, NPV": "share of right ones among the answers of a class, and among all other answers",
}
SCORES = {
    "val_macro_f1": "macro F1 on val",
    "val_accuracy": "accuracy on val",
    "pseudo_accepted": "pseudo-labels accepted",
    "pseudo_accuracy": "accepted ones that are right",
}


def summary(subject: Subject) -> str:
    """Begin with a sentence, then show a warning and four numbers."""
    evaluation = subject.evaluation
    warning = f'<p class="warning">{escape(NOT_A_DEVICE.replace("**", ""))}</p>'
    virtual = [
        text(f"{name} images are virtual: derived from another modality.")
        for name in evaluation.virtual
    ]
    return (
        f'<p class="opening">{escape(opening(evaluation))}</p>'
        + warning
        + text(
            f"{evaluation.n} test samples in {evaluation.groups} groups, {len(evaluation.classes)} "
            f"classes; checkpoint {best_checkpoint(subject.run).name}. The fused opinion:"
        )
        + facts(evaluation)
        + "".join(virtual)
    )


def facts(evaluation: Evaluation) -> str:
    """Show four numbers of the fused opinion with their intervals."""
    fused = evaluation.fused
    shown = "".join(
        f"<div><dt>{title}</dt><dd>{number(fused.values[name])}</dd><dd>{bounds}</dd></div>"
        for name, title, bounds in (
            (n, SHOWN[n], f"95 %: {interval(fused.intervals[n])}")
            for n in ("accuracy", "balanced_accuracy", "macro_auroc", "aurc")
        )
    )
    return f'<dl class="facts">{shown}</dl>'


def opening(evaluation: Evaluation) -> str:
    """State in one sentence the accuracy, with and without referral."""
    sentence = referral_sentence(evaluation.fused.values)
    kept = [own for own in evaluation.referrals if own.rule == evaluation.point.rule]
    if not kept:
        return sentence
    own = kept[0].values
    return (
        f"{sentence} With its stored rule it refers {100 * (1 - own['coverage']):.0f} of 100 and "
        f"is wrong on {100 * own['risk']:.0f}."
    )


def metrics(subject: Subject) -> str:
    """Tabulate the metrics of every opinion and class, and the differences to the other run."""
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
    return section("Metrics", tables(*parts), explanations())


def explanations() -> str:
    """Explain each measure in one line."""
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in MEANINGS.items()
    )
    return f"<details><summary>What the measures mean</summary><dl>{lines}</dl></details>"


def referral(subject: Subject) -> str:
    """Show costs and benefits of referral by uncertainty, and the stored rule if there is one."""
    evaluation, fused = subject.evaluation, subject.assessment.predictions()[FUSED]
    rows = []
    ordered = fused.uncertainty.sort().values
    for percent in (100, 90, 80, 70, 60, 50):
        limit = ordered[max(1, -(-len(fused) * percent // 100)) - 1].item()
        gain = referral_values(fused, Rule("uncertainty", limit))
        shares = (gain["coverage"], gain["risk"], 1 - gain["error"])
        rows.append([f"{limit:.3f}", *(f"{share.item():.0%}" for share in shares)])
    head = ["refer above uncertainty", "answered", "wrong, of all", "right, of the answered"]
    shown = [figures.table(head, rows, "Thresholds on the uncertainty, on these test samples")]
    rules = ""
    if evaluation.referrals:
        caption = guarantee(evaluation.point)
        rules = figures.table(REFERRAL_COLUMNS, referral_rows(evaluation), caption)
        own = evaluation.referrals[0]
        values = [
            [name, number(own.ppv[k]), interval(own.ppv_intervals[k]), number(own.npv[k]),
             interval(own.npv_intervals[k])]
            for k, name in enumerate(evaluation.classes)
        ]  # fmt: skip
        caption = "Predictive values of the samples that the rule answers"
        shown.append(figures.table(["class", "PPV", "95 %", "NPV", "95 %"], values, caption))
    sets = text(set_sentence(evaluation.sets)) if evaluation.sets else ""
    return section("Referral to a person", rules, tables(*shown), sets)


def roc_figure(subject: Subject) -> str:
    """Draw one-against-rest ROC curves of the fused probabilities, one per class."""
    fused, lines = subject.assessment.predictions()[FUSED], []
    for k, name in enumerate(subject.evaluation.classes):
        truth = fused.label == k
        if truth.any() and not truth.all():
            false, true, _ = binary_roc(fused.probability[:, k].clamp(0, 1), truth.long())
            lines.append(Series(name, (100 * false).tolist(), (100 * true).tolist()))
    if not lines:
        return text("ROC curves need samples of two classes.")
    across, up = "false alarms, % (1 - specificity)", "found, % (sensitivity)"
    return figures.line_chart(
        "ROC: each class against the rest, fused", across, up, lines,
        x=Axis(across, 0, 100), y=Axis(up, 0, 100),
    )  # fmt: skip


def curves(subject: Subject) -> str:
    """Draw losses, val scores, throughput and data wait per stage, from ``metrics.jsonl``."""
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
    """Draw one stage; ``other`` holds the same stage of the other run, or is empty."""
    steps = f"optimiser steps of {stage}"
    terms = [name for name in lines[-1] if name == "loss" or name.startswith("loss_")]
    losses = [series(name.removeprefix("loss_"), lines, name) for name in terms]
    # A single term of weight 1 equals the loss: draw one line, not two on top of each other.
    losses = [own for own in losses[:1] if not any(own.y == x.y for x in losses[1:])] + losses[1:]
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
    speed = series("pairs per second", lines, "pairs_per_second")
    return [
        *drawn,
        figures.line_chart(f"{stage}: throughput", steps, "pairs per second", [speed]),
        figures.line_chart(f"{stage}: time that waited for data", steps, "data wait, %", [wait]),
    ]


def series(title: str, lines: Sequence[dict[str, float]], name: str) -> Series:
    """Collect one logged value over its steps."""
    there = [line for line in lines if name in line]
    return Series(title, [line["step"] for line in there], [line[name] for line in there])


def confusion(subject: Subject) -> str:
    """Show the counts of the fused answers in a table."""
    return section(
        "Confusion matrix",
        figures.confusion_table(
            subject.evaluation.fused.confusion, subject.evaluation.classes,
            "Fused answers: number of samples; shade: share of the row",
        ),
    )  # fmt: skip


def certainty(subject: Subject) -> str:
    """Draw calibration, ROC, risk against coverage, and vacuity of right and wrong answers."""
    fused = subject.assessment.predictions()[FUSED]
    right = fused.wrong() == 0
    drawn = [
        figures.reliability_diagram(
            "Reliability of the fused probabilities", fused.probability.amax(1).numpy(),
            right.float().numpy(), BINS,
        ),
        roc_figure(subject),
        risk_figure(subject),
        figures.histogram(
            "Uncertainty of right and wrong answers", "uncertainty (vacuity), fused",
            {"right": fused.uncertainty[right].tolist(),
             "wrong": fused.uncertainty[~right].tolist()},
        ),
    ]  # fmt: skip
    if subject.outside is not None:
        drawn.append(
            figures.histogram(
                "Uncertainty in and out of distribution", "uncertainty (vacuity), fused",
                {"test samples": fused.uncertainty.tolist(),
                 "other distribution": subject.outside.tolist()},
            )
        )  # fmt: skip
    return section("Does it know when it is wrong?", grid(*drawn))


def risk_figure(subject: Subject) -> str:
    """Draw each opinion's error rate over the share answered, most certain first."""
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
    """List the data, the environment and the options of the run."""
    manifest: Manifest = subject.assessment.manifest
    environment = [
        ["rows of the manifest", str(len(manifest.rows))],
        *([f"{name} rows", str(len(manifest.select(name)))] for name in SPLITS),
        ["labelled train rows", str(len(manifest.select("train", labelled=True)))],
        ["python", platform.python_version()],
        ["torch", torch.__version__],
        ["device of this evaluation", str(subject.assessment.classifier.device)],
    ]
    options = (subject.run.folder / "config.yaml").read_text()
    if not subject.paths:
        config = with_paths(subject.run.config, lambda path: path and "(not shown)")
        options = as_yaml(asdict(replace(config, out="(not shown)")))
    return section(
        "Configuration and environment",
        figures.table(["what", "value"], environment, "Data, and the machine that made this page"),
        f"<details><summary>All options of the run</summary><pre>{escape(options)}</pre></details>",
    )
