"""The grid of an experiment: its cells, their runs and their assessment."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.common.files import make_folder, read_json, write_json
from mics_fast.data.manifest import RESERVED, Manifest, read_manifest, write_manifest
from mics_fast.engine.checkpoint import load_checkpoint
from mics_fast.engine.log import read_log
from mics_fast.evaluation.metrics import prediction_metrics, risks_at
from mics_fast.inference.assessment import assess as assess_run
from mics_fast.inference.assessment import labelled_rows, out_of_distribution
from mics_fast.options import ExperimentConfig, TrainConfig, Variant
from mics_fast.options.commands import CONFIG, read_config
from mics_fast.preparation.splits import label_rows
from mics_fast.study.processes import Task
from mics_fast.study.summary import COVERAGES
from mics_fast.study.variants import RECIPES, finetuning_of, pretraining_of
from mics_fast.training.run import (
    Run,
    refuse_changes,
    refuse_other_manifest,
    with_absolute_paths,
)
from mics_fast.training.start import with_encoder
from mics_fast.training.trainer import Trainer

LARGEST_RESULT = 2**26  # bytes


@dataclass(frozen=True)
class Labels:
    """Amount of labels: a fraction, or a number, of the train rows of each class."""

    fraction: float = 0.0
    count: int | None = None

    def __str__(self) -> str:
        return f"{self.count} per class" if self.count else f"{self.fraction:.1%}"

    @property
    def file_name(self) -> str:
        return f"labels-{self.count}-per-class" if self.count else f"labels-{self.fraction:g}"


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        seed, labels, variant: position in the grid.
        config: options of the fine-tuning.
        pretraining: options of the pre-training it starts from; None: from scratch.
        other: path of the out-of-distribution manifest; "" for none.
    """

    seed: int
    labels: Labels
    variant: Variant
    config: TrainConfig
    pretraining: TrainConfig | None
    other: str

    @property
    def file(self) -> Path:
        """Path of the result."""
        return Path(self.config.out) / "result.json"


def make_cells(train: TrainConfig, grid: ExperimentConfig, out: Path) -> list[Cell]:
    """Make all cells of the grid, and write a manifest for each draw of labels.

    Raises:
        InputError: a manifest is invalid.
    """
    manifest = read_manifest(Path(train.data.manifest), train.data.modalities)
    train = with_encoder(train, manifest.modalities)
    labelled_rows(manifest, "test")
    other = ""
    if grid.out_of_distribution:
        other = str(Path(grid.out_of_distribution).resolve())
        read_manifest(Path(other), manifest.modalities)
    cells = []
    for seed in grid.seeds:
        for labels in draws(grid):
            file = out / f"seed-{seed}" / f"{labels.file_name}.csv"
            draw_labels(manifest, file, labels, seed)
            for variant in grid.variants:
                config = finetuning_of(train, variant, manifest)
                pretraining = pretraining_of(train, variant)
                config.seed, config.finetune.init = seed, "none"
                if pretraining is not None:
                    folder = pretraining_folder(out, seed, variant)
                    pretraining.seed, pretraining.out = seed, str(folder)
                    config.finetune.init = str(folder)
                if config.finetune.encoder == "frozen" and not config.finetune.feature_cache:
                    config.finetune.feature_cache = str(out / "features")
                config.data.manifest = str(file)
                config.out = str(file.with_suffix("") / variant)
                cells.append(Cell(seed, labels, variant, config, pretraining, other))
    return cells


def draws(grid: ExperimentConfig) -> list[Labels]:
    """Return every amount of labels, fractions first."""
    counts = [Labels(count=count) for count in grid.label_counts]
    return [Labels(fraction) for fraction in grid.label_fractions] + counts


def missing_tasks(cells: Sequence[Cell]) -> tuple[list[Task], list[Task]]:
    """Return the tasks not yet done: those that need no other task, then those that need them.

    Raises:
        InputError: a run was started with other options.
    """
    first: list[Task] = []
    second: list[Task] = []
    shared: dict[str, Cell] = {}
    for cell in cells:
        refuse_other_options(cell.config)
        if cell.pretraining is not None:
            refuse_other_options(cell.pretraining)
        if is_done(cell):
            continue
        name = f"seed {cell.seed}, labels {cell.labels}, {cell.variant}"
        tasks = first if cell.pretraining is None else second
        tasks.append(Task(name, partial(run_cell, cell)))
        if cell.pretraining is not None:
            shared.setdefault(cell.pretraining.out, cell)
    before = [
        Task(f"seed {cell.seed}, {Path(folder).name}", partial(pretrain, cell.pretraining))
        for folder, cell in shared.items()
        if cell.pretraining is not None
    ]
    return [*before, *first], second


def pretraining_folder(out: Path, seed: int, variant: Variant) -> Path:
    """Return the run folder of a pre-training; cells with the same seed and options share it."""
    off = "-".join(name.removesuffix("_weight") for name in RECIPES[variant].pretrain)
    return out / f"seed-{seed}" / (f"pretraining-without-{off}" if off else "pretraining")


def refuse_other_options(config: TrainConfig) -> None:
    """Refuse to resume a run with other options or another manifest that change its results."""
    folder = Path(config.out)
    if (folder / CONFIG).exists():
        refuse_changes(read_config(folder / CONFIG), with_absolute_paths(config), folder)
        manifest = read_manifest(
            Path(config.data.manifest), config.data.modalities, files_exist=False
        )
        refuse_other_manifest(folder, manifest)


def is_done(cell: Cell) -> bool:
    """Return True if the cell has a complete result for its out-of-distribution manifest."""
    if not cell.file.exists():
        return False
    result = read_result(cell)
    return result.get("other") == cell.other and "missing" in result


def read_result(cell: Cell) -> dict[str, Any]:
    """Read the result of a cell that has been evaluated.

    Raises:
        InputError: the file is damaged.
    """
    result = read_json(cell.file, LARGEST_RESULT)
    if not isinstance(result, dict):
        raise InputError(f"{cell.file} is damaged, wanted a result; remove it to resume")
    return result


def pretrain(config: TrainConfig) -> bool:
    """Pre-train for one seed, resuming if possible; False if stopped by SIGTERM."""
    manifest = read_manifest(Path(config.data.manifest), config.data.modalities)
    return Trainer(config, manifest, resume=True).pretrain()


def run_cell(cell: Cell) -> bool:
    """Train a cell, resuming if possible, and evaluate it; False if stopped by SIGTERM."""
    manifest = read_manifest(Path(cell.config.data.manifest), cell.config.data.modalities)
    trainer = Trainer(cell.config, manifest, resume=True)
    if not trainer.finetune():
        return False
    write_json(cell.file, assess(trainer.run, manifest, cell))
    return True


def draw_labels(manifest: Manifest, file: Path, labels: Labels, seed: int) -> None:
    """Write a manifest with the same rows and splits and newly drawn labelled rows; the draw is
    that of ``prepare`` with this seed."""
    train = manifest.select("train")
    named = [*manifest.classes, ""]  # label -1 indexes the last one
    names = [named[label] for label in train.label]
    groups = list(map(str, train.group))
    chosen = label_rows(names, groups, labels.fraction, seed, count=labels.count)
    labelled = set(train.indices[np.array(chosen, bool)].tolist())
    make_folder(file.parent)
    with open(manifest.path, newline="", encoding="utf-8-sig") as source:
        records = list(csv.DictReader(source))
    before = manifest.path.parent.resolve()
    modalities = [name for name in records[0] if name in manifest.modalities]
    for index, record in enumerate(records):
        record["labelled"] = str(int(index in labelled))
        for name in modalities:
            if record[name]:
                record[name] = os.path.relpath(before / record[name], file.parent.resolve())
    kept = [{name: record[name] for name in (*RESERVED, *modalities)} for record in records
            if any(record[name] for name in modalities)]  # fmt: skip
    write_manifest(file, kept, modalities)


def assess(run: Run, manifest: Manifest, cell: Cell) -> dict[str, Any]:
    """Evaluate a cell on the test rows, and sum up its training time."""
    assessment = assess_run(run, manifest, "test")
    predictions = assessment.predictions()
    views = {
        str(source): prediction_metrics(own) | risks_at(own, COVERAGES)
        for source, own in predictions.items()
    }
    count = 0
    if cell.other:
        areas, count = out_of_distribution(assessment, Path(cell.other))
        for source, area in areas.items():
            views[str(source)]["out_of_distribution_auroc"] = area
    seconds = training_seconds(run, "finetune")
    if cell.pretraining is not None:
        seconds += training_seconds(Run.open(Path(cell.pretraining.out)), "pretrain")
    return {
        "seed": cell.seed,
        "labels": str(cell.labels),
        "variant": cell.variant,
        "labelled": len(manifest.select("train", labelled=True)),
        "n": len(assessment.rows),
        "n_other": count,
        "other": cell.other,
        "views": views,
        "missing": [str(source) for source in predictions if source.missing],
        "curve": validation_curve(run),
        "seconds": seconds,
    }


def validation_curve(run: Run) -> list[tuple[float, float]]:
    """Read steps and fused accuracies on the val rows from the log."""
    lines = read_log(run.folder).get("finetune", [])
    return [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]


def training_seconds(run: Run, stage: str) -> float:
    """Return the wall time of a finished stage, validation included."""
    checkpoint = run.checkpoints(stage).latest()
    assert checkpoint is not None
    return load_checkpoint(checkpoint, {})["seconds"]
