"""The classifier of a run folder, with loaders that prepare images as in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mics_fast.common.errors import InputError
from mics_fast.common.progress import progress
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.engine.checkpoint import fitting, load_checkpoint, read_meta, weights_of
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import Opinions, collect_opinions, state_opinions
from mics_fast.inference.stored_point import stored_point
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import size_of
from mics_fast.options import DataConfig
from mics_fast.training.build import adapt, attach_encoder, new_classifier
from mics_fast.training.run import Run, identity
from mics_fast.training.start import read_encoder


@dataclass
class RunClassifier:
    """The averaged weights of a run's best fine-tuning checkpoint.

    Args:
        run: Folder and options.
        model: On ``device``, in evaluation mode.
        classes: Names, in the order of the model's outputs.
        device: A GPU if there is one.
        point: Calibration and referral rule that ``evaluate`` stored in the run.
    """

    run: Run
    model: Classifier
    classes: tuple[str, ...]
    device: torch.device
    point: OperatingPoint

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    @property
    def heads(self) -> tuple[str, ...]:
        return self.model.views

    @property
    def data(self) -> DataConfig:
        return self.run.config.data

    @property
    def image_size(self) -> int:
        return size_of(self.run.config.model).image

    def state(self, batch: PairBatch) -> Opinions:
        """Compute the opinions on one batch."""
        return state_opinions(self.model, batch, flips=self.point.flips)

    def loader(self, rows: Sequence[Row], data: DataConfig | None = None) -> EvalLoader:
        """Make batches of whole frames, normalised as in training."""
        return EvalLoader(
            rows,
            self.modalities,
            data=data or self.data,
            image_size=self.image_size,
            batch_size=self.run.config.finetune.unlabelled_batch,
            device=self.device,
        )

    def opinions(self, rows: Sequence[Row], title: str, *, hide: bool = False) -> Opinions:
        """Compute the opinions on at least one row, with a progress bar on a terminal."""
        loader = self.loader(rows)
        batches = progress(loader, title, len(loader))
        return collect_opinions(self.model, batches, hide=hide, flips=self.point.flips)


def best_checkpoint(run: Run) -> Path:
    """Find a run's best fine-tuning checkpoint.

    Raises:
        InputError: there is no checkpoint.
    """
    checkpoint = run.checkpoints("finetune").best()
    if checkpoint is None:
        raise InputError(
            f"{run.folder} has no fine-tuning checkpoint, wanted a run that has fine-tuned"
        )
    return checkpoint


def run_manifest(run: Run, file: Path | None = None) -> Manifest:
    """Read a manifest, by default the run's own, with the run's modalities and classes.

    The manifest may lack classes of the run; labels are indices into the run's classes.

    Raises:
        InputError: no checkpoint, an invalid manifest, or a class unknown to the run.
    """
    meta = read_meta(best_checkpoint(run))
    skip = run.config.data.on_bad_file == "skip"
    path = file or Path(run.config.data.manifest)
    manifest = read_manifest(path, meta["modalities"], files_exist=not skip)
    return with_classes(manifest, meta["classes"], run.folder)


def load_run(run: Run) -> RunClassifier:
    """Load the classifier of a run.

    Raises:
        InputError: there is no checkpoint, or it does not match the options.
    """
    checkpoint = best_checkpoint(run)
    meta = read_meta(checkpoint)
    modalities, classes = tuple(meta["modalities"]), tuple(meta["classes"])
    state = load_checkpoint(checkpoint, identity(run.config, modalities, classes, "finetune"))
    model = new_classifier(run.config, modalities, len(classes))
    adapt(model, run.config.finetune)
    with fitting(f"checkpoint {checkpoint}"):
        model.load_state_dict(weights_of(state, "average"))
    if run.config.finetune.encoder == "frozen":
        attach_encoder(model, read_encoder(run))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    point = stored_point(run.folder, checkpoint, classes)
    return RunClassifier(run, model.to(device).eval(), classes, device, point)


def with_classes(manifest: Manifest, classes: Sequence[str], whose: object) -> Manifest:
    """Convert the labels of a manifest to indices into a model's classes.

    Raises:
        InputError: a label is not among them.
    """
    foreign = [name for name in manifest.classes if name not in classes]
    if foreign:
        raise InputError(
            f"manifest {manifest.path} has class {foreign[0]!r}, wanted those of {whose}: "
            f"{', '.join(classes)}"
        )
    number = np.array([*map(classes.index, manifest.classes), -1])  # label -1 indexes the last one
    rows = manifest.rows.with_labels(number[manifest.rows.label])
    return replace(manifest, classes=tuple(classes), rows=rows)
