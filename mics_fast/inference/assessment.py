"""Assess a run on the labelled rows of a split: opinions, metrics, comparison with another run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.evaluation.answers import answer, flat
from mics_fast.evaluation.calibration import Calibration, Kind, fit_calibration
from mics_fast.evaluation.intervals import paired_bootstrap
from mics_fast.evaluation.metrics import (
    out_of_distribution_auroc,
    pseudo_label_quality,
    scalar_metrics,
)
from mics_fast.evaluation.opinions import Opinions, Predictions, Source
from mics_fast.evaluation.results import (
    Comparison,
    Evaluation,
    OpinionMetrics,
    OtherDistribution,
    describe,
)
from mics_fast.inference.run_classifier import RunClassifier, load_run, progress
from mics_fast.stages.pseudo_labels import accepted_in_the_end
from mics_fast.training.run import Run


@dataclass
class Assessment:
    """One run on the labelled rows of a split.

    Args:
        classifier: The run's.
        manifest: Where the rows are from.
        split: Their split.
        rows: Those with a label.
        opinions: On these rows, also with each modality hidden in turn.
        calibration: Fitted on the val rows; None: nothing.
    """

    classifier: RunClassifier
    manifest: Manifest
    split: str
    rows: list[Row]
    opinions: Opinions
    calibration: Calibration | None = None

    def predictions(self, opinions: Opinions | None = None) -> dict[Source, Predictions]:
        """Predict from opinions, by default those on the rows, and calibrate."""
        every = (opinions or self.opinions).predictions()
        return self.calibration.apply(every) if self.calibration else every


def assess(run: Run, manifest: Manifest, split: str, kind: Kind | None = None) -> Assessment:
    """State a run's opinions on the labelled rows of a split.

    Args:
        run: With a fine-tuned checkpoint.
        manifest: With the run's modalities and classes, see ``run_manifest``.
        split: train, val or test.
        kind: "temperature" or "evidence", fitted on the labelled val rows; None: nothing.

    Raises:
        InputError: no fine-tuned checkpoint, one of another model, or no such rows.
    """
    rows = labelled_rows(manifest, split)
    classifier = load_run(run)
    opinions = classifier.opinions(rows, split, hide=True)
    there = set(opinions.sample_id.tolist())  # where bad files are skipped, not all rows
    rows = [row for row in rows if row.index in there]
    calibration = None
    if kind is not None:
        val = classifier.opinions(labelled_rows(manifest, "val"), "val", hide=True)
        calibration = fit_calibration(kind, val.predictions())
    return Assessment(classifier, manifest, split, rows, opinions, calibration)


def labelled_rows(manifest: Manifest, split: str) -> list[Row]:
    """Select the rows of a split whose label is known.

    Raises:
        InputError: there is none.
    """
    rows = [row for row in manifest.select(split) if row.label >= 0]
    if not rows:
        raise InputError(f"{manifest.path} has no row with split {split} and a label")
    return rows


def summarise(assessment: Assessment, count: int) -> Evaluation:
    """Compute every metric of every opinion, with intervals from ``count`` resamples."""
    classes, rows = assessment.classifier.classes, assessment.rows
    predictions = assessment.predictions()
    metrics: dict[Source, OpinionMetrics] = {}
    for source, own in progress(predictions.items(), "bootstrap", len(predictions)):
        # Of two modalities, the fused opinion without one is that of the other.
        same = next((known for known in metrics if predictions[known].same_as(own)), None)
        metrics[source] = replace(metrics[same]) if same else describe(own, classes, count)
    add_pseudo_labels(assessment, metrics)
    return Evaluation(
        metrics,
        n=len(rows),
        groups=len({row.group for row in rows}),
        classes=classes,
        split=assessment.split,
        virtual=sorted({name for row in rows for name in row.virtual}),
        resamples=count,
        calibration=assessment.calibration,
    )


def add_pseudo_labels(assessment: Assessment, metrics: dict[Source, OpinionMetrics]) -> None:
    """Judge the pseudo-labels that each opinion would give to the unlabelled train rows.

    They are accepted as in training, but by the finished model, without augmentation and
    calibration.
    """
    rows = [row for row in assessment.manifest.select("train") if not row.labelled]
    if not rows:
        return
    options = assessment.classifier.run.config.finetune
    opinions = assessment.classifier.opinions(rows, "unlabelled", hide=True)
    for source, own in opinions.predictions().items():
        if source in metrics:
            accepted = accepted_in_the_end(options, own.probability, own.uncertainty)
            if accepted is not None:
                metrics[source].pseudo_labels = pseudo_label_quality(own, accepted)


def add_out_of_distribution(evaluation: Evaluation, assessment: Assessment, file: Path) -> None:
    """Add how well the vacuity of each opinion detects the rows of another manifest."""
    areas, count = out_of_distribution(assessment, file)
    evaluation.out_of_distribution = OtherDistribution(str(file), count)
    for source, area in areas.items():
        evaluation.metrics[source].values["out_of_distribution_auroc"] = area


def out_of_distribution(assessment: Assessment, file: Path) -> tuple[dict[Source, float], int]:
    """Compute the AUROC of vacuity for every opinion that has rows of both, and count the others.

    Args:
        assessment: On the rows that the model should know.
        file: A manifest none of whose rows it should know.
    """
    manifest = read_manifest(file, assessment.classifier.modalities)
    opinions = assessment.classifier.opinions(manifest.rows, "out of distribution", hide=True)
    inside, outside = assessment.predictions(), assessment.predictions(opinions)
    areas = {
        source: out_of_distribution_auroc(inside[source], own)
        for source, own in outside.items()
        if source in inside
    }
    return areas, len(manifest.rows)


def compare(assessment: Assessment, other: Assessment, count: int) -> Comparison:
    """Compare the metrics of two runs, for every opinion that both state.

    Raises:
        InputError: they were not assessed on the same rows, classes and labels.
    """
    mine = [(row.id, row.label) for row in assessment.rows]
    theirs = [(row.id, row.label) for row in other.rows]
    here, there = assessment.classifier.run.folder, other.classifier.run.folder
    if assessment.classifier.classes != other.classifier.classes or mine != theirs:
        raise InputError(
            f"{here} and {there} cannot be compared: wanted the same classes, rows and labels, "
            f"got {len(mine)} and {len(theirs)} rows of which {len({*mine} & {*theirs})} agree"
        )
    first, second = assessment.predictions(), other.predictions()
    shared = [source for source, own in first.items()
              if source in second and len(second[source]) == len(own)]  # fmt: skip
    differences = {
        source: paired_bootstrap(first[source], second[source], scalar_metrics, count=count)
        for source in progress(shared, "paired bootstrap", len(shared))
    }
    return Comparison(str(there), differences)


def opinion_table(assessment: Assessment) -> list[dict[str, object]]:
    """Make a flat record per row: id, true class, whether the answer is right, the answer."""
    classes = assessment.classifier.classes
    answers = answer(assessment.opinions, [row.id for row in assessment.rows], classes)
    return [
        {
            "id": row.id,
            "label": classes[row.label],
            "correct": int(own["class"] == classes[row.label]),
            **flat({name: value for name, value in own.items() if name != "id"}),
        }
        for row, own in zip(assessment.rows, answers, strict=True)
    ]
