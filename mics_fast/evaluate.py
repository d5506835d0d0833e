"""``python -m mics_fast.evaluate``: how good a run is, for each modality alone and fused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import softplus
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_f1_score,
    multiclass_recall,
)

from mics_fast.data.manifest import Manifest, read_manifest
from mics_fast.data.pipeline import EvalLoader, PairBatch
from mics_fast.engine.checkpoint import load_checkpoint
from mics_fast.errors import InputError, SentenceParser, run_command
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import SIZES
from mics_fast.run import Run, identity
from mics_kernels import fuse_evidence, opinion


@dataclass
class View:
    """What one view says of the rows it sees.

    Args:
        probability: (N, C) expected class probabilities.
        uncertainty: (N,) vacuity in [0, 1].
        label: (N,) int64, the truth.
    """

    probability: Tensor
    uncertainty: Tensor
    label: Tensor


@torch.no_grad()
def collect_opinions(model: Classifier, batches: Iterable[PairBatch]) -> dict[str, View]:
    """Run a classifier over evaluation batches.

    "fused" combines every view of the model, the fusion encoder's included, by Dempster's rule; a
    modality's own entry holds only the rows that have it.
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[View]] = {name: [] for name in ("fused", *model.modalities)}
    for batch in batches:
        output = model(batch.views, batch.present)
        evidence = softplus(output.logits)
        fused = opinion(fuse_evidence(evidence, present=output.present))
        parts["fused"].append(
            View(fused.probability.cpu(), fused.uncertainty.cpu(), batch.label.cpu())
        )
        single = opinion(evidence)
        for column, name in enumerate(model.modalities):
            here = batch.present[:, column]
            parts[name].append(
                View(
                    single.probability[here, column].cpu(),
                    single.uncertainty[here, column].cpu(),
                    batch.label[here].cpu(),
                )
            )
    model.train(was_training)
    return {name: concatenate(views) for name, views in parts.items()}


def concatenate(views: Sequence[View]) -> View:
    """One view of all batches."""
    return View(
        torch.cat([view.probability for view in views]),
        torch.cat([view.uncertainty for view in views]),
        torch.cat([view.label for view in views]),
    )


def view_metrics(view: View, num_classes: int) -> dict[str, float]:
    """Metrics of one view over the rows it sees.

    Balanced accuracy is the mean recall, and macro AUROC the mean one-against-rest AUROC, over
    the classes that occur in the truth; all values in [0, 1].
    """
    probability, label = view.probability, view.label
    occurring = label.unique()
    recall = multiclass_recall(probability, label, num_classes, average="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that do not occur, left out below
        auroc = multiclass_auroc(probability, label, num_classes, average="none")
    assert isinstance(auroc, Tensor)
    return {
        "accuracy": multiclass_accuracy(probability, label, num_classes, average="micro").item(),
        "balanced_accuracy": recall[occurring].mean().item(),
        "macro_f1": multiclass_f1_score(probability, label, num_classes, average="macro").item(),
        "macro_auroc": auroc[occurring].mean().item(),
        "uncertainty": view.uncertainty.mean().item(),
        "n": len(label),
    }


def evaluate(run: Run, manifest: Manifest, split: str) -> dict[str, Any]:
    """Metrics of a run's best checkpoint on the labelled rows of a split.

    Raises:
        InputError: no fine-tuned checkpoint, one of another model, or nothing to evaluate on.
    """
    config = run.config
    rows = [row for row in manifest.select(split) if row.label >= 0]
    if not rows:
        raise InputError(f"{manifest.path} has no row with split {split} and a label")
    model = load_classifier(run, manifest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = EvalLoader(
        rows,
        manifest.modalities,
        data=config.data,
        image_size=SIZES[config.model.size].image,
        batch_size=config.finetune.unlabelled_batch,
        device=device,
    )
    opinions = collect_opinions(model.to(device), loader)
    return {
        "views": {
            name: view_metrics(view, len(manifest.classes))
            for name, view in opinions.items()
            if len(view.label)
        },
        "n": len(opinions["fused"].label),
        "classes": list(manifest.classes),
        "split": split,
        "virtual": sorted({name for row in rows for name in row.virtual}),
    }


def load_classifier(run: Run, manifest: Manifest) -> Classifier:
    """The averaged weights of a run's best fine-tuning checkpoint.

    Raises:
        InputError: there is none, or it is of another model.
    """
    checkpoint = run.checkpoints("finetune").best()
    if checkpoint is None:
        raise InputError(f"{run.folder} has no fine-tuning checkpoint to evaluate")
    state = load_checkpoint(checkpoint, identity(run.config, manifest, "finetune"))
    model = Classifier(
        SIZES[run.config.model.size],
        manifest.modalities,
        len(manifest.classes),
        pool=run.config.model.pool,
        fusion_depth=run.config.model.fusion_depth,
    )
    prefix = "average."
    model.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in state["stage"].items()
            if name.startswith(prefix)
        }
    )
    return model


def print_table(result: dict[str, Any]) -> None:
    """The metrics as a table, a row for each view; derived modalities are called virtual."""
    table = Table(title=f"{result['split']}: {result['n']} pairs, {len(result['classes'])} classes")
    names = ["accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "uncertainty", "n"]
    table.add_column("view")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for view, metrics in result["views"].items():
        values = [f"{metrics[name]:.3f}" for name in names[:-1]] + [str(metrics["n"])]
        table.add_row(f"virtual {view}" if view in result["virtual"] else view, *values)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a run folder; print a table and, where asked, write JSON."""
    parser = SentenceParser(prog="python -m mics_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of mics_fast.train")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--manifest", type=Path, help="default: the run's own")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    options = parser.parse_args(arguments)
    run = Run.open(options.run)
    file = options.manifest or Path(run.config.data.manifest)
    skip = run.config.data.on_bad_file == "skip"
    manifest = read_manifest(file, run.config.data.modalities, files_exist=not skip)
    result = evaluate(run, manifest, options.split)
    print_table(result)
    if options.json:
        write_json(options.json, result)


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Write to a temporary name, then rename.

    Raises:
        InputError: the file cannot be written.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(file)
    except OSError as error:
        raise InputError(f"--json {file} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)
