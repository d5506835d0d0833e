"""Evaluate a run on the labelled rows of a split: opinions, metrics, comparison with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.evaluation.calibration import Kind, calibrate, fit_factor
from mics_fast.evaluation.intervals import (
    LEVEL,
    bootstrap,
    extreme_interval,
    paired_bootstrap,
)
from mics_fast.evaluation.metrics import (
    class_metrics,
    confusion,
    out_of_distribution_auroc,
    pseudo_label_quality,
    sampled_metrics,
    view_metrics,
)
from mics_fast.evaluation.opinions import Opinions, View, flat_record, records
from mics_fast.inference.run_model import Trained, load_trained, progress
from mics_fast.stages.pseudo_labels import is_pseudo_label
from mics_fast.training.run import Run


@dataclass
class Evaluated:
    """One run on the labelled rows of a split.

    Args:
        trained: the classifier.
        manifest: where the rows are from.
        rows: those with a label.
        opinions: of the rows, with each modality hidden in turn.
        factors: view -> calibration factor; empty without calibration.
        kind: of calibration, None without.
    """

    trained: Trained
    manifest: Manifest
    rows: list[Row]
    opinions: Opinions
    factors: dict[str, float]
    kind: Kind | None = None

    def views(self, opinions: Opinions) -> dict[str, View]:
        """Calibrated: "fused", each modality, and "without" each; those that see a row."""
        every = all_views(opinions)
        if self.kind:
            every = {
                name: calibrate(view, self.kind, self.factors[name])
                for name, view in every.items()
                if name in self.factors
            }
        return every


def all_views(opinions: Opinions) -> dict[str, View]:
    """Every view that sees a row; the fused one of the others is called "without <modality>"."""
    missing = {f"without {name}": view for name, view in opinions.missing().items()}
    every = opinions.each() | missing
    return {name: view for name, view in every.items() if len(view.label)}


def evaluate(run: Run, manifest: Manifest, split: str, kind: Kind | None = None) -> Evaluated:
    """A run's opinions of the labelled rows of a split.

    Args:
        run: with a fine-tuned checkpoint.
        manifest: with its modalities and classes.
        split: train, val or test.
        kind: "temperature" or "evidence": fit this on the labelled val rows; None: nothing.

    Raises:
        InputError: no fine-tuned checkpoint, one of another model, or nothing to evaluate on.
    """
    rows = labelled_rows(manifest, split)
    trained = load_trained(run, manifest)
    opinions = trained.opinions(rows, split, hide=True)
    there = set(opinions.sample_id.tolist())  # where bad files are skipped, not all rows
    rows = [row for row in rows if row.index in there]
    evaluated = Evaluated(trained, manifest, rows, opinions, {}, kind)
    if kind is not None:
        fitted = trained.opinions(labelled_rows(manifest, "val"), "val", hide=True)
        evaluated.factors = {
            name: fit_factor(view, kind) for name, view in all_views(fitted).items()
        }
    return evaluated


def labelled_rows(manifest: Manifest, split: str) -> list[Row]:
    """The rows of a split whose label is known.

    Raises:
        InputError: there is none.
    """
    rows = [row for row in manifest.select(split) if row.label >= 0]
    if not rows:
        raise InputError(f"{manifest.path} has no row with split {split} and a label")
    return rows


def summarise(evaluated: Evaluated, split: str, count: int) -> dict[str, Any]:
    """Every metric of every view, as JSON.

    Args:
        evaluated: rows and opinions.
        split: their name.
        count: bootstrap resamples.
    """
    modalities = evaluated.trained.model.modalities
    classes = evaluated.trained.classes
    views = evaluated.views(evaluated.opinions)
    described: dict[str, dict[str, Any]] = {}
    for name, view in progress(views.items(), "bootstrap", len(views)):
        # Of two modalities, what is said without one is what the other says alone.
        same = next((known for known in described if views[known].same_as(view)), None)
        described[name] = dict(described[same]) if same else describe(view, classes, count)
    add_pseudo_labels(evaluated, described)
    result = {
        "views": {name: described[name] for name in ("fused", *modalities) if name in described},
        "missing": {
            name: described[f"without {name}"]
            for name in modalities
            if f"without {name}" in described
        },
        "n": len(evaluated.rows),
        "groups": len({row.group for row in evaluated.rows}),
        "classes": list(classes),
        "split": split,
        "virtual": sorted({name for row in evaluated.rows for name in row.virtual}),
        "intervals": {"level": LEVEL, "resamples": count, "unit": "group"},
    }
    if evaluated.kind:
        result["calibration"] = {"kind": evaluated.kind, "factors": evaluated.factors}
    return result


def describe(view: View, classes: Sequence[str], count: int) -> dict[str, Any]:
    """Metrics of one view with their intervals, for all classes and for each."""
    intervals = bootstrap(view, sampled_metrics, count=count)
    each = {name: values.tolist() for name, values in class_metrics(view).items()}
    scalars = view_metrics(view)
    if scalars["accuracy"] in (0, 1):
        intervals["accuracy"] = extreme_interval(scalars["accuracy"], view.group)
    for k in range(len(classes)):
        own = view.label == k
        for name, rows in (("sensitivity", own), ("specificity", ~own)):
            if each[name][k] in (0, 1):
                intervals[f"{name}/{k}"] = extreme_interval(each[name][k], view.group[rows])
    return {
        **scalars,
        "n": len(view.label),
        "intervals": {name: x for name, x in intervals.items() if "/" not in name},
        "per_class": {
            label: {name: values[k] for name, values in each.items()}
            | {"n": int((view.label == k).sum())}
            | {"intervals": {name: intervals[f"{name}/{k}"] for name in each}}
            for k, label in enumerate(classes)
        },
        "confusion": confusion(view),
    }


def add_pseudo_labels(evaluated: Evaluated, described: dict[str, dict[str, Any]]) -> None:
    """How many unlabelled train rows each view would accept, and how many of those it gets right.

    As training decides, but by the finished model and without augmentation or calibration.
    """
    rows = [row for row in evaluated.manifest.select("train") if not row.labelled]
    if not rows:
        return
    options = evaluated.trained.run.config.finetune
    opinions = evaluated.trained.opinions(rows, "unlabelled", hide=True)
    for name, view in all_views(opinions).items():
        accepted = is_pseudo_label(options, view.probability, view.uncertainty)
        if name in described:
            described[name]["pseudo_labels"] = pseudo_label_quality(view, accepted)


def add_out_of_distribution(result: dict[str, Any], evaluated: Evaluated, file: Path) -> None:
    """How well each view's vacuity tells the evaluated rows from all rows of another manifest."""
    areas, count = out_of_distribution(evaluated, file)
    result["out_of_distribution"] = {"manifest": str(file), "n": count}
    for name, area in areas.items():
        described = result["missing"] if name.startswith("without ") else result["views"]
        described[name.removeprefix("without ")]["out_of_distribution_auroc"] = area


def out_of_distribution(evaluated: Evaluated, file: Path) -> tuple[dict[str, float], int]:
    """For every view that sees rows of both the area by its vacuity; how many other rows.

    Args:
        evaluated: the rows that the model should know.
        file: a manifest of which every row is another's.
    """
    manifest = read_manifest(file, evaluated.trained.model.modalities)
    opinions = evaluated.trained.opinions(manifest.rows, "out of distribution", hide=True)
    inside, outside = evaluated.views(evaluated.opinions), evaluated.views(opinions)
    areas = {
        name: out_of_distribution_auroc(inside[name], view)
        for name, view in outside.items()
        if name in inside
    }
    return areas, len(manifest.rows)


def compare(evaluated: Evaluated, other: Evaluated, count: int) -> dict[str, Any]:
    """Differences of the metrics of both runs, for every view that both have.

    Raises:
        InputError: they were not evaluated on the same rows, classes and labels.
    """
    mine = [(row.id, row.label) for row in evaluated.rows]
    theirs = [(row.id, row.label) for row in other.rows]
    here, there = evaluated.trained.run.folder, other.trained.run.folder
    if evaluated.trained.classes != other.trained.classes or mine != theirs:
        raise InputError(
            f"{here} and {there} cannot be compared: wanted the same classes, rows and labels, "
            f"got {len(mine)} and {len(theirs)} rows of which {len({*mine} & {*theirs})} agree"
        )
    first, second = evaluated.views(evaluated.opinions), other.views(other.opinions)
    shared = [name for name in first if name in second
              and len(first[name].label) == len(second[name].label)]  # fmt: skip
    return {
        "run": str(there),
        "views": {
            name: {
                metric: value
                for metric, value in paired_bootstrap(
                    first[name], second[name], sampled_metrics, count=count
                ).items()
                if "/" not in metric
            }
            for name in progress(shared, "paired bootstrap", len(shared))
        },
    }


def opinion_table(evaluated: Evaluated) -> list[dict[str, Any]]:
    """A flat record a row: its id and true class, what the model says, and whether it is right."""
    names = [row.id for row in evaluated.rows]
    classes = evaluated.trained.classes
    stated = records(evaluated.opinions, names, classes)
    return [
        {
            "id": record["id"],
            "label": classes[row.label],
            "correct": int(record["class"] == classes[row.label]),
            **flat_record({name: x for name, x in record.items() if name != "id"}),
        }
        for row, record in zip(evaluated.rows, stated, strict=True)
    ]
