"""The model card: facts and limits to read before using an exported model, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.data.manifest import SPLITS, Manifest
from mics_fast.evaluation.results import Evaluation
from mics_fast.evaluation.tables import (
    CLASS_COLUMNS,
    class_rows,
    markdown_table,
    markdown_text,
    metric_rows,
    shown_columns,
)
from mics_fast.inference.assessment import assess, summarise
from mics_fast.inference.run_classifier import RunClassifier, run_manifest
from mics_fast.models.sizes import network_name
from mics_fast.models.weights import HUB

NOT_A_DEVICE = (
    "**Not a medical device.** This model has not been validated for clinical use and must not "
    "inform decisions about patients."
)


def model_card(
    classifier: RunClassifier, agreement: dict[str, float], resamples: int, *, paths: bool = True
) -> str:
    """Write the card from the run, its manifest and an evaluation on the test rows.

    Args:
        classifier: The exported classifier.
        agreement: Exported file -> largest difference from the original.
        resamples: Number of bootstrap resamples.
        paths: True to name files and folders.
    """
    name = markdown_text(classifier.run.folder.resolve().name) if paths else "a run"
    parts = [f"# Model card: {name}", NOT_A_DEVICE, intended(classifier)]
    try:
        manifest = run_manifest(classifier.run)
        parts.append(data_section(manifest, paths=paths))
        evaluation = summarise(assess(classifier.run, manifest, "test"), resamples)
        parts.append(metrics_section(evaluation))
        virtual = evaluation.virtual
    except InputError as error:
        reason = markdown_text(str(error)) if paths else "its manifest cannot be used"
        parts.append(f"## Metrics\n\nNot measured when the model was exported: {reason}.")
        virtual = []
    parts += [
        training_section(classifier, paths=paths),
        limits(classifier, virtual),
        files_section(agreement),
    ]
    return "\n\n".join(parts) + "\n"


def intended(classifier: RunClassifier) -> str:
    """Describe inputs and outputs."""
    modalities, classes = classifier.modalities, classifier.classes
    return (
        "## What it does\n\n"
        f"It states an opinion on one sample of up to {len(modalities)} images "
        f"({names(modalities)}; at least one): the belief in each of {len(classes)} classes "
        f"({names(classes)}), and how much belief is left uncommitted (vacuity). It also gives the "
        "opinion of each modality and the conflict between them. Intended for research on methods "
        "of classification."
    )


def names(values: Iterable[str]) -> str:
    """Join names as Markdown."""
    return ", ".join(map(markdown_text, values))


def data_section(manifest: Manifest, *, paths: bool) -> str:
    """Count samples by class and split, and the labelled train rows."""
    own = {split: Counter(manifest.select(split).label.tolist()) for split in SPLITS}
    labelled = Counter(manifest.select("train", labelled=True).label.tolist())
    named = [*enumerate(manifest.classes), (-1, "(no label)")]
    rows = [
        [markdown_text(name), *(str(own[split][k]) for split in SPLITS), str(labelled[k])]
        for k, name in named
        if any(own[split][k] for split in SPLITS)
    ]
    absent = {name: int(manifest.rows.missing(name).sum()) for name in manifest.modalities}
    missing = [f"{markdown_text(name)} is missing from {n} samples" for name, n in absent.items()]
    name = f"Manifest {markdown_text(manifest.path.name)}" if paths else "One manifest"
    return "\n\n".join(
        [
            "## Data",
            f"{name}: {len(manifest.rows)} samples in "
            f"{len(np.unique(manifest.rows.group))} groups; {'; '.join(missing)}.",
            markdown_table(["class", *SPLITS, "labelled train"], rows),
        ]
    )


def metrics_section(evaluation: Evaluation) -> str:
    """Tabulate the metrics of every opinion, then those of each class."""
    columns = shown_columns(evaluation)
    others = [markdown_text(title) for title in list(columns)[1:]]
    per_class = [[markdown_text(row[0]), *row[1:]] for row in class_rows(evaluation.fused)]
    return "\n\n".join(
        [
            "## Metrics",
            f"On {evaluation.n} test samples ({evaluation.groups} groups). Intervals: 95 %, "
            f"bootstrap over groups, {evaluation.resamples} resamples. They say how the figure "
            "would vary over other samples of the same source, not over other hospitals, cameras "
            "or training runs.",
            markdown_table(["metric", "fused", "95 %", *others], metric_rows(columns)),
            markdown_table(["class (fused)", *CLASS_COLUMNS[1:]], per_class),
        ]
    )


def training_section(classifier: RunClassifier, *, paths: bool) -> str:
    """State the options that shape the model."""
    config = classifier.run.config
    options = config.finetune
    length = f"{options.steps} steps" if options.steps else f"{options.epochs} epochs"
    own = "the pre-training of the same run, if any"
    start = (markdown_text(options.init) if paths else "another run") if options.init else own
    weights = config.model.init
    if weights:
        shown = markdown_text(weights) if paths or weights.startswith(HUB) else "a file"
        start += f", the encoders begun from the weights of {shown}"
    parameters = sum(p.numel() for p in classifier.model.parameters())
    return (
        "## Training\n\n"
        f"`{network_name(config.model)}`, {parameters / 1e6:.1f} million parameters, "
        f"seed {config.seed}; "
        f"fine-tuned for {length} from {start}; "
        f"{config.data.normalize} normalisation. All options are in the run's `config.yaml`. "
        "Method: MICS, arXiv 2509.17492, as implemented by mics-fast."
    )


def limits(classifier: RunClassifier, virtual: Iterable[str]) -> str:
    """List the limits of the figures."""
    lines = [
        "One training run on one data set: other seeds, label draws and sources were not tried.",
        "It knows only the classes above: on anything else it may be wrong and certain.",
        "Uncertainty is learned from the training data; choose a threshold on data from the place "
        "of use.",
    ]
    lines += [
        f"{markdown_text(name)} images were derived from another modality (virtual): figures that "
        "use them are not figures for real ones."
        for name in virtual
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def files_section(agreement: dict[str, float]) -> str:
    """List the exported files and their agreement with the trained model."""
    rows = [[f"`{name}`", f"{largest:.1e}"] for name, largest in agreement.items()]
    return "\n\n".join(
        [
            "## Files",
            markdown_table(["file", "largest difference from the trained model"], rows),
            "Inputs, outputs and preprocessing are described in `model.json`.",
        ]
    )
