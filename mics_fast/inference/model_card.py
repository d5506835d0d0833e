"""The model card: what a person should read before using an exported model, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import SPLITS, Manifest
from mics_fast.evaluation.tables import CLASS_COLUMNS, class_rows, markdown_table, metric_rows
from mics_fast.inference.evaluated import evaluate, summarise
from mics_fast.inference.run_model import Trained, run_manifest

NOT_A_DEVICE = (
    "**Not a medical device.** This model has not been validated for clinical use and must not "
    "inform decisions about patients."
)


def model_card(trained: Trained, agreement: dict[str, float], resamples: int) -> str:
    """Filled from the run, its manifest and an evaluation on the test rows.

    Args:
        trained: the classifier.
        agreement: exported file -> largest difference from the original.
        resamples: of the bootstrap.
    """
    parts = [f"# Model card: {trained.run.folder.resolve().name}", NOT_A_DEVICE, intended(trained)]
    try:
        manifest = run_manifest(trained.run)
        parts.append(data_section(manifest))
        result = summarise(evaluate(trained.run, manifest, "test"), "test", resamples)
        parts.append(metrics_section(result))
        virtual = result["virtual"]
    except InputError as error:
        parts.append(f"## Metrics\n\nNot measured when the model was exported: {error}.")
        virtual = []
    parts += [training_section(trained), limits(trained, virtual), files_section(agreement)]
    return "\n\n".join(parts) + "\n"


def intended(trained: Trained) -> str:
    """What goes in and what comes out."""
    return (
        "## What it does\n\n"
        f"It states an opinion on one sample of up to {len(trained.modalities)} images "
        f"({', '.join(trained.modalities)}; at least one): the belief in each of "
        f"{len(trained.classes)} classes ({', '.join(trained.classes)}), and how much belief is "
        "left uncommitted (vacuity). Each modality's own opinion and the conflict between them "
        "are given too. Intended for research on methods of classification."
    )


def data_section(manifest: Manifest) -> str:
    """Samples by class and split, and how many of the train rows were labelled."""
    counts = Counter((row.label, row.split) for row in manifest.rows)
    labelled = Counter(row.label for row in manifest.rows if row.split == "train" and row.labelled)
    named = [*enumerate(manifest.classes), (-1, "(no label)")]
    rows = [
        [name, *(str(counts[k, split]) for split in SPLITS), str(labelled[k])]
        for k, name in named
        if any(counts[k, split] for split in SPLITS)
    ]
    missing = [
        f"{name} is missing from {sum(row.files[name] is None for row in manifest.rows)} samples"
        for name in manifest.modalities
    ]
    return "\n\n".join(
        [
            "## Data",
            f"Manifest `{manifest.path.name}`: {len(manifest.rows)} samples in "
            f"{len({row.group for row in manifest.rows})} groups; {'; '.join(missing)}.",
            markdown_table(["class", *SPLITS, "labelled train"], rows),
        ]
    )


def metrics_section(result: dict[str, Any]) -> str:
    """Fused metrics with intervals beside those of each modality, then each class."""
    views = result["views"]
    others = [name for name in views if name != "fused"]
    virtual = [f"virtual {name}" if name in result["virtual"] else name for name in others]
    return "\n\n".join(
        [
            "## Metrics",
            f"On {result['n']} test samples ({result['groups']} groups). Intervals: 95 %, "
            f"bootstrap over groups, {result['intervals']['resamples']} resamples; they say how "
            "other samples of the same source would vary the figure, not other hospitals, cameras "
            "or training runs.",
            markdown_table(["metric", "fused", "95 %", *virtual], metric_rows(views)),
            markdown_table(["class (fused)", *CLASS_COLUMNS[1:]], class_rows(views["fused"])),
        ]
    )


def training_section(trained: Trained) -> str:
    """The options that shape the model."""
    config = trained.run.config
    options = config.finetune
    length = f"{options.steps} steps" if options.steps else f"{options.epochs} epochs"
    parameters = sum(p.numel() for p in trained.model.parameters())
    return (
        "## Training\n\n"
        f"`{config.model.size}`, {parameters / 1e6:.1f} million parameters, seed {config.seed}; "
        f"fine-tuned for {length} from "
        f"{config.finetune.init or 'the pre-training of the same run, if it has one'}; "
        f"{config.data.normalize} normalisation. All options are in the run's `config.yaml`. "
        "Method: MICS, arXiv 2509.17492, as implemented by mics-fast."
    )


def limits(trained: Trained, virtual: Iterable[str]) -> str:
    """What the figures above do not show."""
    lines = [
        "One training run on one data set; other seeds, other label draws and other sources were "
        "not looked at here.",
        "It knows no class but those above: on anything else it can be wrong and sure of it.",
        "Uncertainty is learned from the training data; a threshold on it should be chosen on "
        "data of the place of use.",
    ]
    lines += [
        f"`{name}` images were derived from another modality (virtual): figures that use them are "
        "not figures for real ones."
        for name in virtual
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def files_section(agreement: dict[str, float]) -> str:
    """What was exported and how exactly it agrees with the trained model."""
    rows = [[f"`{name}`", f"{largest:.1e}"] for name, largest in agreement.items()]
    return "\n\n".join(
        [
            "## Files",
            markdown_table(["file", "largest difference from the trained model"], rows),
            "Inputs, outputs and preprocessing are described in `model.json`.",
        ]
    )
