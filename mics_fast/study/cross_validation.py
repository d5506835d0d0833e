"""Cross-validation: one run per fold, and the opinions on all test rows as one evaluation.

Each row is judged by the run that was not trained on it. Folds share no group, so pooled rows are
as independent as those of one test split; intervals do not show how much runs vary by chance.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import Manifest, digest_difference, read_manifest
from mics_fast.evaluation.metrics import prediction_metrics
from mics_fast.evaluation.opinions import FUSED, gather
from mics_fast.evaluation.results import Evaluation, describe
from mics_fast.inference.assessment import Assessment, assess, labelled_rows
from mics_fast.inference.run_classifier import progress, run_manifest
from mics_fast.options import TrainConfig
from mics_fast.study.experiment import refuse_other_options
from mics_fast.study.processes import Task
from mics_fast.training.run import Run
from mics_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Fold:
    """One round.

    Args:
        name: "fold-1" and so on.
        config: Of its run.
    """

    name: str
    config: TrainConfig


def make_folds(train: TrainConfig, folder: Path, out: Path) -> list[Fold]:
    """List the rounds for the manifests that ``prepare --folds`` has written.

    Raises:
        InputError: there are fewer than two, they are not of one set of rows, or a row is tested
            twice or never.
    """
    files = sorted(folder.glob("fold-*.csv"), key=lambda file: (len(file.name), file.name))
    if len(files) < 2:
        raise InputError(
            f"{folder} holds {len(files)} files fold-*.csv, wanted those of prepare --folds"
        )
    manifests = [read_manifest(file, train.data.modalities) for file in files]
    check_folds(manifests)
    folds = []
    for file in files:
        config = copy.deepcopy(train)
        config.stage = "both"
        config.data.manifest, config.out = str(file.absolute()), str(out / file.stem)
        refuse_other_options(config)
        folds.append(Fold(file.stem, config))
    return folds


def check_folds(manifests: Sequence[Manifest]) -> None:
    """Refuse manifests that are not the folds of one set of rows.

    Raises:
        InputError: names the first fault.
    """
    first, tested = manifests[0], dict[str, Path]()
    for own in manifests:
        before, now = first.digest(), own.digest()
        kept = {name for name in now if name not in ("split", "labelled")}
        difference = digest_difference(*({n: d[n] for n in kept} for d in (before, now)))
        if difference:
            raise InputError(f"{own.path} is no fold of the rows of {first.path}: {difference}")
        for row in labelled_rows(own, "test"):
            if row.id in tested:
                raise InputError(f"row {row.id} is tested in {tested[row.id]} and in {own.path}")
            tested[row.id] = own.path
    missing = [row.id for row in first.rows if row.label >= 0 and row.id not in tested]
    if missing:
        raise InputError(f"row {missing[0]} is tested in no fold of {first.path.parent}")


def missing_folds(folds: Sequence[Fold]) -> list[Task]:
    """List the runs to train, each from where it was."""
    return [Task(fold.name, partial(run_fold, fold)) for fold in folds]


def run_fold(fold: Fold) -> bool:
    """Train the run of a fold, from where it was; False if SIGTERM asked to stop."""
    manifest = read_manifest(Path(fold.config.data.manifest), fold.config.data.modalities)
    trainer = Trainer(fold.config, manifest, resume=True)
    return trainer.pretrain() and trainer.finetune()


def assess_folds(folds: Sequence[Fold]) -> list[Assessment]:
    """State the opinions of every run on its own test rows."""
    runs = [Run.open(Path(fold.config.out)) for fold in folds]
    return [assess(run, run_manifest(run), "test") for run in runs]


def pool(assessments: Sequence[Assessment]) -> Assessment:
    """Join the opinions of all runs on their own test rows, in the order of the folds.

    The classifier is that of the first fold: for names only, its opinions are on one fold.
    """
    first = assessments[0]
    return replace(
        first,
        rows=[row for own in assessments for row in own.rows],
        opinions=gather([own.opinions for own in assessments]),
        split="out of fold",
    )


def summarise_folds(pooled: Assessment, count: int) -> Evaluation:
    """Compute every metric of every pooled opinion, with intervals from ``count`` resamples."""
    predictions, classes = pooled.predictions(), pooled.classifier.classes
    metrics = {
        source: describe(own, classes, count)
        for source, own in progress(predictions.items(), "bootstrap", len(predictions))
    }
    return Evaluation(
        metrics,
        n=len(pooled.rows),
        groups=len({row.group for row in pooled.rows}),
        classes=classes,
        split=pooled.split,
        virtual=sorted({name for row in pooled.rows for name in row.virtual}),
        resamples=count,
    )


def fold_rows(folds: Sequence[Fold], assessments: Sequence[Assessment]) -> list[list[str]]:
    """Return the cells of ``FOLD_COLUMNS`` per fold."""
    rows = []
    for fold, own in zip(folds, assessments, strict=True):
        values = prediction_metrics(own.predictions()[FUSED])
        scores = [f"{values[name]:.3f}" for name in ("accuracy", "macro_f1", "macro_auroc")]
        rows.append([fold.name, str(len(own.rows)), *scores])
    return rows


FOLD_COLUMNS = ("fold", "n", "accuracy", "macro F1", "macro AUROC")
