"""``python -m mics_fast.experiment``: which part of the method helps, over seeds and label draws.

One command trains every variant of the method for every seed and label fraction on the splits of
one manifest, and ends in one table. It can be stopped or killed at any moment; the same command
goes on where it was:

    OUT/seed-0/pretraining/                 shared by all fractions and variants of the seed
    OUT/seed-0/labels-0.05.csv              the manifest with the labels of this draw
    OUT/seed-0/labels-0.05/<variant>/       a run folder, with result.json when it is evaluated
    OUT/results.json, OUT/results.md        the table

Variants are paired by seed: they see the same labels, the same order and the same first weights.
"""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.markdown import Markdown

from mics_fast.config import (
    ExperimentConfig,
    TrainConfig,
    Variant,
    check_config,
    check_experiment,
)
from mics_fast.data.manifest import RESERVED, Manifest, read_manifest, write_manifest
from mics_fast.data.splits import label_rows
from mics_fast.errors import InputError, run_command
from mics_fast.evaluate import all_views, evaluate, labelled_rows
from mics_fast.files import make_folder, write_json, write_text
from mics_fast.metrics import view_metrics
from mics_fast.run import Run, parse_options
from mics_fast.summary import markdown, tabulate
from mics_fast.train import Trainer

# The first variant with each part; those after it keep it.
LADDER = get_args(Variant)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the grid, then write and print the table."""
    train, grid = parse(arguments)
    out = Path(train.out).resolve()
    manifest = read_manifest(Path(train.data.manifest), train.data.modalities)
    labelled_rows(manifest, "test")
    results = []
    for seed in grid.seeds:
        for fraction in grid.label_fractions:
            for variant in grid.variants:
                print(f"seed {seed}, {fraction:.1%} of the labels, {variant}", flush=True)
                result = run_one(train, manifest, out, seed, fraction, variant)
                if result is None:
                    print(f"stopped and saved: the same command goes on, --out {train.out}")
                    return
                results.append(result)
    table = tabulate(results, grid.label_fractions, grid.variants)
    write_json(out / "results.json", table)
    text = markdown(table)
    write_text(out / "results.md", text)
    Console().print(Markdown(text))
    print(f"wrote {train.out}/results.md and results.json")


def parse(arguments: Sequence[str] | None) -> tuple[TrainConfig, ExperimentConfig]:
    """The options of every run, and the grid.

    Raises:
        InputError: an unknown or ill-typed option, or one out of range.
    """
    parser = ArgumentParser(
        prog="python -m mics_fast.experiment",
        description="Train variants of the method over seeds and label fractions; one table.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with options")
    parser.add_class_arguments(TrainConfig, nested_key=None)
    parser.add_class_arguments(ExperimentConfig, "experiment")
    values = parse_options(parser, arguments)
    grid = values.pop("experiment")
    train = TrainConfig(**values)
    check_config(train)
    check_experiment(grid)
    for name, value in (("--data.manifest", train.data.manifest), ("--out", train.out)):
        if not value:
            raise InputError(f"option {name} is missing")
    return train, grid


def run_one(
    train: TrainConfig, manifest: Manifest, out: Path, seed: int, fraction: float, variant: str
) -> dict[str, Any] | None:
    """Train and evaluate one cell of the grid, or read what an earlier call made of it.

    Returns:
        Seed, label fraction, variant, metrics of every view, seconds of training; None where
        SIGTERM asked to stop.
    """
    config = copy.deepcopy(train)
    config.seed = seed
    if pretrained(variant):
        config.stage, config.out = "pretrain", str(out / f"seed-{seed}" / "pretraining")
        # Called also where it is complete: it refuses to go on with other options.
        if not Trainer(config, manifest, resume=True).pretrain():
            return None
    config.finetune.init = config.out if pretrained(variant) else "none"
    config.stage = "finetune"
    drawn = draw_labels(manifest, out / f"seed-{seed}" / f"labels-{fraction:g}.csv", fraction, seed)
    config.data.manifest = str(drawn.path)
    config.out = str(drawn.path.with_suffix("") / variant)
    leave_out(config, variant)
    file = Path(config.out) / "result.json"
    trainer = Trainer(config, drawn, resume=True)
    if not file.exists():
        if not trainer.finetune():
            return None
        write_json(file, assess(trainer.run, drawn, seed, fraction, variant))
    return json.loads(file.read_text())


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


def draw_labels(manifest: Manifest, file: Path, fraction: float, seed: int) -> Manifest:
    """The same rows and splits with other labelled ones: a draw from the seed, as ``prepare``'s."""
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
    return read_manifest(file, manifest.modalities)


def assess(
    run: Run, manifest: Manifest, seed: int, fraction: float, variant: str
) -> dict[str, Any]:
    """Metrics of every view on the test rows."""
    evaluated = evaluate(run, manifest, "test")
    pretraining = Path(run.config.finetune.init)
    return {
        "seed": seed,
        "label_fraction": fraction,
        "variant": variant,
        "labelled": len(manifest.select("train", labelled=True)),
        "n": len(evaluated.rows),
        "views": {name: view_metrics(view) for name, view in all_views(evaluated.opinions).items()},
        "seconds": training_seconds(run.folder)
        + (training_seconds(pretraining) if pretrained(variant) else 0.0),
    }


def training_seconds(folder: Path) -> float:
    """Wall time that the last stage of a run took, validation included."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


if __name__ == "__main__":
    run_command(main)
