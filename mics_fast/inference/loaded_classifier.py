"""The interface of classifiers to prediction: of a run, an export, or an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import Opinions
from mics_fast.options import DataConfig


class LoadedClassifier(Protocol):
    """A classifier ready to state opinions on batches."""

    @property
    def modalities(self) -> tuple[str, ...]: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def image_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def point(self) -> OperatingPoint: ...

    def loader(self, rows: Sequence[Row], data: DataConfig | None = None) -> EvalLoader: ...

    def state(self, batch: PairBatch) -> Opinions: ...
