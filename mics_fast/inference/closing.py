"""Output at the end of a run: a short evaluation, and the commands to try next."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from torch import Tensor

from mics_fast.common.files import printable
from mics_fast.data.manifest import Manifest
from mics_fast.evaluation.counted import mean_of
from mics_fast.evaluation.intervals import bootstrap
from mics_fast.evaluation.metrics import prediction_metrics
from mics_fast.evaluation.opinions import FUSED, Predictions
from mics_fast.evaluation.referral import Target
from mics_fast.evaluation.tables import interval, number, referral_sentence, wide_console
from mics_fast.inference.assessment import Assessment, assess
from mics_fast.inference.run_classifier import run_manifest
from mics_fast.training.run import Run

TARGETS = (0.05, 0.1, 0.2)  # risks to suggest, the first one that the val rows suffice for


def print_closing(folder: Path) -> None:
    """Print the scores of the fused opinion and of each modality, what referral brings, and the
    next commands.

    The rows are those of the test split, or of the val split where none of test has a label.

    Raises:
        InputError: the run cannot be evaluated.
    """
    run, console = Run.open(folder), wide_console()
    manifest = run_manifest(run)
    split = next((own for own in ("test", "val") if manifest.select(own).known), None)
    if split is None:
        console.print("no row of test or val has a label: nothing to evaluate")
    else:
        assessment = assess(run, manifest, split)
        console.print(short_table(assessment))
        values = prediction_metrics(assessment.predictions()[FUSED])
        console.print(referral_sentence(values), soft_wrap=True)
    for line in next_commands(folder, manifest):
        console.print(line, soft_wrap=True)


def short_table(assessment: Assessment) -> Table:
    """Tabulate a few scores, one row per opinion."""
    title = f"{assessment.split}: {len(assessment.rows)} pairs"
    table = Table("opinion", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("accuracy", "95 %", "balanced accuracy", "macro F1", "macro AUROC"):
        table.add_column(name, justify="right")
    for source, own in assessment.predictions().items():
        if not source.missing:
            values = prediction_metrics(own)
            ends = bootstrap(own, accuracy)["accuracy"].tolist()
            scores = [number(values[name]) for name in
                      ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")]  # fmt: skip
            table.add_row(printable(source.name), scores[0], interval(ends), *scores[1:])
    return table


def accuracy(predictions: Predictions, counts: Tensor) -> dict[str, Tensor]:
    """Compute the share of right answers in each resample, (R,); see ``counted``."""
    return {"accuracy": mean_of(1 - predictions.wrong(), counts)}


def next_commands(folder: Path, manifest: Manifest) -> list[str]:
    """Name two commands that go on from a trained run, each with what it is for."""
    run = shlex.quote(str(folder))
    groups = len(np.unique(manifest.select("val").known.group))
    risk = next((own for own in TARGETS if groups >= Target(own).fewest_groups()), None)
    evaluate = f"mics-fast evaluate {run}" + (f" --target-risk {risk}" if risk else "")
    report = f"mics-fast report {run}"
    width = max(len(evaluate), len(report))
    first = "when to refer to a person" if risk else "every metric, with intervals"
    return [
        f"next: {evaluate:{width}}  # {first}",
        f"      {report:{width}}  # cases, curves and calibration on a page",
    ]
