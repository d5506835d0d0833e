"""The grid of an experiment: its cells, their runs, what each of them is assessed by."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from mics_fast.common.files import make_folder, write_json
from mics_fast.data.manifest import RESERVED, Manifest, read_manifest, write_manifest
from mics_fast.engine.checkpoint import load_checkpoint
from mics_fast.evaluation.metrics import risks_at, view_metrics
from mics_fast.inference.evaluated import all_views, evaluate, labelled_rows, out_of_distribution
from mics_fast.options.config import (
    ExperimentConfig,
    TrainConfig,
    Variant,
)
from mics_fast.preparation.splits import label_rows
from mics_fast.study.processes import Task
from mics_fast.study.summary import COVERAGES
from mics_fast.training.run import Run, read_config, refuse_changes
from mics_fast.training.trainer import Trainer

# Each variant adds a part, and keeps those of the variants before it.
LADDER = get_args(Variant)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        seed, fraction, variant: where it is in the grid.
        config: of its fine-tuning.
        other: path of the out-of-distribution manifest; "" = none.
    """

    seed: int
    fraction: float
    variant: str
    config: TrainConfig
    other: str

    @property
    def file(self) -> Path:
        """Of its result."""
        return Path(self.config.out) / "result.json"


def make_cells(train: TrainConfig, grid: ExperimentConfig, out: Path) -> list[Cell]:
    """All cells of the grid; the labels of each draw are written to its manifest.

    Raises:
        InputError: a manifest cannot be used.
    """
    manifest = read_manifest(Path(train.data.manifest), train.data.modalities)
    labelled_rows(manifest, "test")
    other = ""
    if grid.out_of_distribution:
        other = str(Path(grid.out_of_distribution).resolve())
        read_manifest(Path(other), manifest.modalities)
    cells = []
    for seed in grid.seeds:
        for fraction in grid.label_fractions:
            file = out / f"seed-{seed}" / f"labels-{fraction:g}.csv"
            draw_labels(manifest, file, fraction, seed)
            for variant in grid.variants:
                config = copy.deepcopy(train)
                config.seed, config.stage = seed, "finetune"
                config.finetune.init = (
                    str(pretraining_folder(out, seed)) if pretrained(variant) else "none"
                )
                config.data.manifest = str(file)
                config.out = str(file.with_suffix("") / variant)
                leave_out(config, variant)
                cells.append(Cell(seed, fraction, variant, config, other))
    return cells


def missing_tasks(
    train: TrainConfig, cells: Sequence[Cell], out: Path
) -> tuple[list[Task], list[Task]]:
    """What is still to be done: first all that waits for nothing, then what needs pre-training.

    Raises:
        InputError: a run was begun with other options.
    """
    first: list[Task] = []
    second: list[Task] = []
    for seed in dict.fromkeys(cell.seed for cell in cells if pretrained(cell.variant)):
        config = copy.deepcopy(train)
        config.seed, config.stage, config.out = seed, "pretrain", str(pretraining_folder(out, seed))
        refuse_other_options(config)
        if not all(is_done(cell) for cell in cells if cell.seed == seed):
            first.append(Task(f"seed {seed}, pre-training", partial(pretrain, config)))
    for cell in cells:
        refuse_other_options(cell.config)
        if not is_done(cell):
            name = f"seed {cell.seed}, {cell.fraction:.1%} of the labels, {cell.variant}"
            tasks = second if pretrained(cell.variant) else first
            tasks.append(Task(name, partial(run_cell, cell)))
    return first, second


def pretraining_folder(out: Path, seed: int) -> Path:
    """The run folder of the pre-training that all cells of a seed share."""
    return out / f"seed-{seed}" / "pretraining"


def refuse_other_options(config: TrainConfig) -> None:
    """Refuse to go on with a run under options that would change what it computes."""
    folder = Path(config.out)
    if (folder / "config.yaml").exists():
        refuse_changes(read_config(folder / "config.yaml"), config, folder)


def is_done(cell: Cell) -> bool:
    """Whether a cell has been evaluated as it should be."""
    return cell.file.exists() and json.loads(cell.file.read_text()).get("other") == cell.other


def pretrain(config: TrainConfig) -> bool:
    """Pre-train for one seed, from where it was; False where SIGTERM asked to stop."""
    manifest = read_manifest(Path(config.data.manifest), config.data.modalities)
    return Trainer(config, manifest, resume=True).pretrain()


def run_cell(cell: Cell) -> bool:
    """Train a cell, from where it was, and evaluate it; False where SIGTERM asked to stop."""
    manifest = read_manifest(Path(cell.config.data.manifest), cell.config.data.modalities)
    trainer = Trainer(cell.config, manifest, resume=True)
    if not trainer.finetune():
        return False
    write_json(cell.file, assess(trainer.run, manifest, cell))
    return True


def pretrained(variant: str) -> bool:
    """Whether a variant starts from pre-training."""
    return variant != "supervised"


def leave_out(config: TrainConfig, variant: str) -> None:
    """Switch off the terms of fine-tuning that a variant does not have yet."""
    has = LADDER.index(variant)
    if has < LADDER.index("pseudo-labels"):
        config.finetune.unlabelled_weight = 0.0
    if has < LADDER.index("shift"):
        config.finetune.shift_weight = 0.0
    if has < LADDER.index("full"):
        config.finetune.modality_consistency_weight = 0.0


def draw_labels(manifest: Manifest, file: Path, fraction: float, seed: int) -> None:
    """Write the same rows and splits with other labelled ones, drawn by the seed as ``prepare``
    does."""
    train = manifest.select("train")
    names = ["" if row.label < 0 else manifest.classes[row.label] for row in train]
    chosen = label_rows(names, [str(row.group) for row in train], fraction, seed)
    labelled = {row.index for row, keeps in zip(train, chosen, strict=True) if keeps}
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
    """Metrics of every view on the test rows, and how long the training took."""
    evaluated = evaluate(run, manifest, "test")
    views = {
        name: view_metrics(view) | risks_at(view, COVERAGES)
        for name, view in all_views(evaluated.opinions).items()
    }
    count = 0
    if cell.other:
        areas, count = out_of_distribution(evaluated, Path(cell.other))
        for name, area in areas.items():
            views[name]["out_of_distribution_auroc"] = area
    seconds = training_seconds(run, "finetune")
    if pretrained(cell.variant):
        seconds += training_seconds(Run.open(Path(run.config.finetune.init)), "pretrain")
    return {
        "seed": cell.seed,
        "label_fraction": cell.fraction,
        "variant": cell.variant,
        "labelled": len(manifest.select("train", labelled=True)),
        "n": len(evaluated.rows),
        "n_other": count,
        "other": cell.other,
        "views": views,
        "seconds": seconds,
    }


def training_seconds(run: Run, stage: str) -> float:
    """Wall time that a finished stage took, validation included."""
    checkpoint = run.checkpoints(stage).latest()
    assert checkpoint is not None
    return load_checkpoint(checkpoint, {})["seconds"]
