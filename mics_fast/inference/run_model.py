"""A fine-tuned classifier out of a run folder, and batches as it was trained to see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from mics_fast.common.errors import InputError
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.engine.checkpoint import load_checkpoint, read_meta, weights_of
from mics_fast.evaluation.opinions import Opinions, collect_opinions, state_opinions
from mics_fast.models.classifier import Classifier
from mics_fast.models.sizes import SIZES
from mics_fast.training.run import Run, identity

T = TypeVar("T")


@dataclass
class Trained:
    """The averaged weights of a run's best fine-tuning checkpoint.

    Args:
        run: where it comes from.
        model: on ``device``, in evaluation mode.
        classes: names, in the order of the model's outputs.
        device: a GPU where there is one.
    """

    run: Run
    model: Classifier
    classes: tuple[str, ...]
    device: torch.device

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities

    @property
    def views(self) -> tuple[str, ...]:
        return self.model.views

    def answer(self, batch: PairBatch) -> Opinions:
        """What the model says of one batch."""
        return state_opinions(self.model, batch)

    def loader(self, rows: Sequence[Row]) -> EvalLoader:
        """Batches of whole frames, normalised as in training."""
        config = self.run.config
        return EvalLoader(
            rows,
            self.model.modalities,
            data=config.data,
            image_size=SIZES[config.model.size].image,
            batch_size=config.finetune.unlabelled_batch,
            device=self.device,
        )

    def opinions(self, rows: Sequence[Row], title: str, *, hide: bool = False) -> Opinions:
        """What the model says of at least one row, with a progress bar on a terminal."""
        loader = self.loader(rows)
        return collect_opinions(self.model, progress(loader, title, len(loader)), hide=hide)


def best_checkpoint(run: Run) -> Path:
    """The folder of a run's best fine-tuning checkpoint.

    Raises:
        InputError: there is none.
    """
    checkpoint = run.checkpoints("finetune").best()
    if checkpoint is None:
        raise InputError(
            f"{run.folder} has no fine-tuning checkpoint, wanted a run that has fine-tuned"
        )
    return checkpoint


def run_manifest(run: Run, file: Path | None = None) -> Manifest:
    """A manifest, default the run's own, with the modalities that the run was trained on.

    Raises:
        InputError: no checkpoint, or a manifest that cannot be used.
    """
    modalities = read_meta(best_checkpoint(run))["modalities"]
    skip = run.config.data.on_bad_file == "skip"
    manifest = file or Path(run.config.data.manifest)
    return read_manifest(manifest, modalities, files_exist=not skip)


def load_trained(run: Run, manifest: Manifest | None = None) -> Trained:
    """The classifier of a run.

    Args:
        run: its folder and configuration.
        manifest: the labels that it must know; None where none are looked at.

    Raises:
        InputError: there is none, or it is of another model than the configuration or the
            manifest says.
    """
    checkpoint = best_checkpoint(run)
    meta = read_meta(checkpoint)
    known = manifest or Manifest(checkpoint, tuple(meta["modalities"]), tuple(meta["classes"]), ())
    state = load_checkpoint(checkpoint, identity(run.config, known, "finetune"))
    model = Classifier(
        SIZES[run.config.model.size],
        known.modalities,
        len(known.classes),
        pool=run.config.model.pool,
        fusion_depth=run.config.model.fusion_depth,
    )
    model.load_state_dict(weights_of(state, "average"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trained(run, model.to(device).eval(), known.classes, device)


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, with a progress bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    yield from track(items, title, total, console=console, disable=not console.is_terminal)
