"""Assess a run on the labelled rows of a split: opinions, metrics, comparison with another run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from mics_fast.common.anonymity import pseudonym
from mics_fast.common.errors import InputError
from mics_fast.common.progress import progress
from mics_fast.data.image_header import RefusedImage
from mics_fast.data.manifest import Manifest, Row, Rows, read_manifest
from mics_fast.data.shards import read_image
from mics_fast.evaluation import CRITERIA, By
from mics_fast.evaluation.answers import answer, flat
from mics_fast.evaluation.calibration import Calibration, Kind, fit_calibration
from mics_fast.evaluation.intervals import paired_bootstrap
from mics_fast.evaluation.metrics import (
    out_of_distribution_auroc,
    pseudo_label_quality,
    scalar_metrics,
)
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import FUSED, Opinions, Predictions, Source
from mics_fast.evaluation.prediction_sets import SetQuality, choose_sets, measure_sets
from mics_fast.evaluation.referral import (
    Referral,
    Target,
    apply_rule,
    choose_rule,
)
from mics_fast.evaluation.results import (
    Comparison,
    Evaluation,
    OpinionMetrics,
    OtherDistribution,
    describe,
)
from mics_fast.inference.run_classifier import RunClassifier, load_run, run_manifest
from mics_fast.stages.pseudo_labels import EVIDENTIAL, accepted_in_the_end
from mics_fast.training.run import Run


@dataclass
class Assessment:
    """Opinions of a run on the labelled rows of a split.

    Args:
        classifier: Classifier of the run.
        manifest: Source of the rows.
        split: Split of the rows.
        rows: Rows with a label.
        opinions: On these rows, also with each modality hidden in turn.
        calibration: Fitted on the val rows; None without calibration.
    """

    classifier: RunClassifier
    manifest: Manifest
    split: str
    rows: Sequence[Row]
    opinions: Opinions
    calibration: Calibration | None = None

    def predictions(self, opinions: Opinions | None = None) -> dict[Source, Predictions]:
        """Make calibrated predictions from opinions, by default those on the rows."""
        every = (opinions or self.opinions).predictions()
        return self.calibration.apply(every) if self.calibration else every


def assess(
    run: Run,
    manifest: Manifest,
    split: str,
    kind: Kind | Literal["none"] | None = None,
    flips: bool | None = None,
) -> Assessment:
    """Run a classifier on the labelled rows of a split.

    Args:
        run: A run with a fine-tuned checkpoint.
        manifest: With the run's modalities and classes; see ``run_manifest``.
        split: train, val or test.
        kind: "temperature" or "evidence", fitted on the labelled val rows; "none": no calibration;
            None: the one stored in the run, if any.
        flips: Average opinions over mirror images; None: as stored in the run. Where that differs
            from the stored operating point, the rest of it is not used.

    Raises:
        InputError: no fine-tuned checkpoint, one of another model, or no such rows.
    """
    rows = labelled_rows(manifest, split)
    classifier = load_run(run)
    if flips is not None and flips != classifier.point.flips:
        classifier.point = OperatingPoint(flips=flips)
    opinions = classifier.opinions(rows, split, hide=True)
    # Under the policy "skip", not all rows have one.
    rows = rows.where(np.isin(rows.indices, opinions.sample_id))
    calibration = classifier.point.calibration if kind is None else None
    if kind in get_args(Kind):
        val = classifier.opinions(labelled_rows(manifest, "val"), "val", hide=True)
        calibration = fit_calibration(cast(Kind, kind), val.predictions())
    return Assessment(classifier, manifest, split, rows, opinions, calibration)


def trained_on(assessment: Assessment) -> list[Row]:
    """Find the assessed rows that the run was trained on: train rows of its own manifest.

    A row is the same if it has the same id and shares the bytes of an image. Without the run's own
    manifest, no row is found.
    """
    run = assessment.classifier.run
    try:
        own = run_manifest(run)
    except InputError:
        return []
    train = {row.id: row for row in own.select("train")}
    return [row for row in assessment.rows if row.id in train and same_image(row, train[row.id])]


def same_image(row: Row, other: Row) -> bool:
    """Return True if two rows share an image of a modality, by path or by content."""
    for name, file in row.files.items():
        against = other.files.get(name)
        if file is None or against is None:
            continue
        if file == against:
            return True
        with suppress(OSError, RefusedImage):
            if np.array_equal(read_image(file), read_image(against)):
                return True
    return False


def anonymised(assessment: Assessment, key: bytes | None) -> Assessment:
    """Replace the ids of the rows by pseudonyms, if there is a key."""
    if key is None:
        return assessment
    rows = [replace(row, id=pseudonym(key, row.id)) for row in assessment.rows]
    return replace(assessment, rows=rows)


def labelled_rows(manifest: Manifest, split: str) -> Rows:
    """Select the rows of a split whose label is known.

    Raises:
        InputError: there is none.
    """
    rows = manifest.select(split).known
    if not rows:
        raise InputError(f"{manifest.path} has no row with split {split} and a label")
    return rows


def choose_point(
    assessment: Assessment, target: Target | None, by: By, count: int
) -> tuple[OperatingPoint, list[Referral]]:
    """Choose a referral rule on the val rows, and measure it on the assessed rows.

    Args:
        assessment: With its calibration.
        target: The requested guarantee; None: measure the rule stored in the run, which is dropped
            if it was chosen under another calibration.
        by: Criterion of the rule to keep; every criterion is measured.
        count: Bootstrap resamples.

    Raises:
        InputError: no val rows, or too few of them.
    """
    own, stored = assessment.predictions()[FUSED], assessment.classifier.point
    if target is None:
        point = replace(stored, calibration=assessment.calibration)
        if stored.calibration != assessment.calibration:
            point = replace(point, rule=None, target=None, predictive_values={})
        return point, [apply_rule(own, point.rule, count)] if point.rule else []
    rows = labelled_rows(assessment.manifest, "val")
    val = assessment.predictions(assessment.classifier.opinions(rows, "val"))[FUSED]
    measured = [apply_rule(own, choose_rule(val, each, target), count) for each in CRITERIA]
    chosen = next(each for each in measured if each.rule.by == by)
    values = {
        name: {"ppv": chosen.ppv[k], "npv": chosen.npv[k]}
        for k, name in enumerate(assessment.classifier.classes)
    }
    point = replace(
        stored,
        calibration=assessment.calibration,
        rule=chosen.rule,
        target=target,
        predictive_values=values,
    )
    return point, measured


def choose_prediction_sets(
    assessment: Assessment, coverage: float | None, count: int
) -> SetQuality | None:
    """Choose prediction sets on the val rows, and measure them on the assessed rows.

    Args:
        assessment: With its calibration.
        coverage: The requested share of sets that hold the truth; None: measure the sets stored in
            the run, unless they were chosen under another calibration.
        count: Bootstrap resamples.

    Returns:
        None if there are no sets.

    Raises:
        InputError: no val rows, or too few of them.
    """
    stored = assessment.classifier.point
    rule = stored.sets if assessment.calibration == stored.calibration else None
    if coverage is not None:
        rows = labelled_rows(assessment.manifest, "val")
        val = assessment.predictions(assessment.classifier.opinions(rows, "val"))[FUSED]
        rule = choose_sets(val, coverage)
    return measure_sets(assessment.predictions()[FUSED], rule, count) if rule else None


def summarise(assessment: Assessment, count: int) -> Evaluation:
    """Compute every metric of every opinion, with intervals from ``count`` resamples."""
    classes, rows = assessment.classifier.classes, assessment.rows
    predictions = assessment.predictions()
    metrics: dict[Source, OpinionMetrics] = {}
    for source, own in progress(predictions.items(), "bootstrap", len(predictions)):
        # With two modalities, the fused opinion without one equals the other.
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
    """Measure the pseudo-labels that each opinion would give to the unlabelled train rows.

    They are accepted as in training, but by the final model, without augmentation and calibration.
    Rules that read logits are left out: opinions do not contain them.
    """
    rows = assessment.manifest.select("train", labelled=False)
    options = assessment.classifier.run.config.finetune
    if not rows or options.pseudo_labels not in EVIDENTIAL:
        return
    opinions = assessment.classifier.opinions(rows, "unlabelled", hide=True)
    for source, own in opinions.predictions().items():
        if source in metrics:
            accepted = accepted_in_the_end(options, own.probability, own.uncertainty)
            metrics[source].pseudo_labels = pseudo_label_quality(own, accepted)


def add_out_of_distribution(evaluation: Evaluation, assessment: Assessment, file: Path) -> None:
    """Add the AUROC with which each opinion's vacuity detects the rows of another manifest."""
    areas, count = out_of_distribution(assessment, file)
    evaluation.out_of_distribution = OtherDistribution(str(file), count)
    for source, area in areas.items():
        evaluation.metrics[source].values["out_of_distribution_auroc"] = area


def out_of_distribution(assessment: Assessment, file: Path) -> tuple[dict[Source, float], int]:
    """Compute the AUROC of vacuity for each opinion with rows of both manifests.

    Args:
        assessment: On in-distribution rows.
        file: Manifest of out-of-distribution rows.

    Returns:
        The areas, and the number of out-of-distribution rows.
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
    """Compare the metrics of two runs for every opinion that both have.

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
    point = replace(assessment.classifier.point, calibration=assessment.calibration)
    answers = answer(assessment.opinions, [row.id for row in assessment.rows], classes, point)
    return [
        {
            "id": row.id,
            "label": classes[row.label],
            "correct": int(own["class"] == classes[row.label]),
            **flat({name: value for name, value in own.items() if name != "id"}),
        }
        for row, own in zip(assessment.rows, answers, strict=True)
    ]
