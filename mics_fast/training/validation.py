"""Scores of a stage during training, on the val rows; the ranks share the rows that are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch

from mics_fast.common.errors import NoUsableImage
from mics_fast.data.augmentation import epoch_order
from mics_fast.data.features import FeaturePass, FeatureRows, Features
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Manifest, Row
from mics_fast.engine.distributed import CPU, from_each, share_of
from mics_fast.engine.precision import Precision
from mics_fast.evaluation.metrics import prediction_metrics
from mics_fast.evaluation.opinions import Predictions, collect_opinions, gather
from mics_fast.options import DataConfig, TrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.neighbours import Features as NeighbourFeatures
from mics_fast.training.neighbours import (
    bounded,
    extract_features,
    joined_features,
    neighbour_accuracy,
)
from mics_fast.training.output import say

SHOWN = 6  # samples in a picture

T = TypeVar("T")
Collect = Callable[[Iterable[PairBatch]], T]


class ValRows:
    """The val rows with a label, and functions that score stages on them.

    Args:
        config: the run's options.
        manifest: training data.
        data: how images are read, with this process's threads.
        image_size: side of the views, pixels.
        device: training device.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        data: DataConfig,
        image_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.manifest, self.data = config, manifest, data
        self.image_size, self.device = image_size, device
        self.rows = manifest.select("val").known

    def example(self) -> PairBatch:
        """Load a few val rows for pictures, the same ones each time."""
        rows = self.rows
        chosen = [rows[place] for place in sorted(epoch_order(0, 0, len(rows))[:SHOWN])]
        return next(iter(self.loader(chosen, SHOWN)))

    def validation(
        self, stage: FinetuneStage, kept: Features | None, latest: list[Predictions]
    ) -> Callable[[], dict[str, float]] | None:
        """Return a function that scores the averaged model on the val rows; None without any.

        Args:
            stage: fine-tuning.
            kept: features of the val rows, where it reads features.
            latest: receives the predictions of the latest validation.
        """
        rows: Sequence[Row] = self.rows
        if not rows:
            return None
        size = self.config.finetune.unlabelled_batch
        own: Iterable[PairBatch] | None
        if kept is None:
            own = self._own_eval_loader(rows, size)
        else:
            rows = FeatureRows(kept, rows, self.device).rows
            mine = self._own_rows(rows)
            own = FeaturePass(FeatureRows(kept, mine, self.device), size) if mine else None

        def validate() -> dict[str, float]:
            parts = self._over_ranks(rows, own, partial(collect_opinions, stage.average))
            latest[:] = [gather(parts).fused()]
            metrics = prediction_metrics(latest[0])
            return {f"val_{name}": metrics[name] for name in ("macro_f1", "accuracy")}

        return validate

    def neighbours(
        self, stage: PretrainStage, precision: Precision
    ) -> Callable[[], dict[str, float]] | None:
        """Return a function that classifies val rows by their nearest labelled rows.

        None without val rows or labelled rows. Scores of the untrained network and the share of
        the most frequent class are added for comparison.

        Args:
            stage: not yet trained.
            precision: of its products.
        """
        val = self.rows
        labelled = self.manifest.select("train", labelled=True)
        if not val or not labelled:
            return None
        asked, size = bounded(val), self.config.pretrain.batch_size
        sides = [(rows, self._own_eval_loader(rows, size)) for rows in (bounded(labelled), asked)]

        def extract(batches: Iterable[PairBatch]) -> NeighbourFeatures:
            return extract_features(stage.model, batches, precision.autocast).to(CPU)

        def score() -> dict[str, float]:
            keys, queries = (
                joined_features(self._over_ranks(rows, own, extract)).to(self.device)
                for rows, own in sides
            )
            return neighbour_accuracy(keys, queries, self.manifest.modalities)

        beside = {"knn_chance": max(Counter(row.label for row in asked).values()) / len(asked)}
        if not self.config.shard_parameters:  # a sharded network is not yet on the devices
            before = score()
            if "knn_accuracy" in before:
                beside["knn_accuracy_untrained"] = before["knn_accuracy"]
                say(
                    "pretrain: before training, nearest neighbours are right in "
                    f"{before['knn_accuracy']:.1%} of val rows (largest class: "
                    f"{beside['knn_chance']:.1%})"
                )
        return lambda: score() | beside

    def _own_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows that this rank scores: its share, or all for a sharded network."""
        return rows if self.config.shard_parameters else share_of(rows)

    def _own_eval_loader(self, rows: Sequence[Row], batch_size: int) -> EvalLoader | None:
        own = self._own_rows(rows)
        return self.loader(own, batch_size) if own else None

    def _over_ranks(
        self, rows: Sequence[Row], own: Iterable[PairBatch] | None, collect: Collect[T]
    ) -> list[T]:
        return over_ranks(len(rows), own, collect, shared=not self.config.shard_parameters)

    def loader(self, rows: Sequence[Row], batch_size: int) -> EvalLoader:
        """Load rows as evaluation does."""
        return EvalLoader(
            rows,
            self.manifest.modalities,
            data=self.data,
            image_size=self.image_size,
            batch_size=batch_size,
            device=self.device,
        )


def over_ranks(
    rows: int, batches: Iterable[PairBatch] | None, collect: Collect[T], *, shared: bool
) -> list[T]:
    """Collect results of rows, each rank from the batches of its own rows.

    Args:
        rows: number of rows of all ranks together.
        batches: of this rank's rows; None if it has none.
        collect: makes a result of at least one batch; it travels between processes, on the CPU.
        shared: False if every rank has all rows, as a sharded network needs: each part of it is
            asked for by all ranks at the same time.

    Returns:
        At least one result, in the order of the rows, equal on all ranks.

    Raises:
        NoUsableImage: no row of any rank has an image that can be used.
    """

    def own() -> T | None:
        try:
            return None if batches is None else collect(batches)
        except NoUsableImage:
            return None

    found = [part for part in (from_each(own) if shared else [own()]) if part is not None]
    if not found:
        raise NoUsableImage(f"none of {rows} rows has an image that can be used")
    return found
