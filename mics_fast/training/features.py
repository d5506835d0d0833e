"""Compute the features that frozen encoders keep, once, or take them from a folder of other runs.

A file in that folder is named by a digest of everything that its features depend on: the encoder's
weights, its arithmetic and pooling, the preprocessing and augmentation, and the bytes of every
image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mics_fast.common.files import make_folder, renamed
from mics_fast.common.progress import progress
from mics_fast.data.batch import PairBatch
from mics_fast.data.features import Features
from mics_fast.data.image_header import RefusedImage
from mics_fast.data.loaders import EvalLoader, TrainLoader
from mics_fast.data.manifest import Row
from mics_fast.data.shards import read_image
from mics_fast.engine.precision import Precision
from mics_fast.models.pooled import pooled
from mics_fast.models.vit import Attention, Pool, VisionTransformer
from mics_fast.options import AugmentConfig, DataConfig

BATCH = 16  # rows that the encoder works on at a time

Tensors = dict[str, Tensor]


class FeatureMaker:
    """Turns images into features.

    Args:
        encoder: frozen, on its device, in evaluation mode.
        pool: as ``Classifier``.
        precision: of the encoder's arithmetic.
        modalities: names.
        data: normalisation, what to do with bad files.
        folder: keeps features for other runs; None: none does.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        pool: Pool,
        precision: Precision,
        modalities: Sequence[str],
        data: DataConfig,
        folder: Path | None,
    ) -> None:
        self.encoder, self.pool, self.precision = encoder, pool, precision
        self.modalities, self.data, self.folder = tuple(modalities), data, folder

    def plain(self, loader: EvalLoader, rows: Sequence[Row]) -> Features:
        """Compute the features of whole frames; rows without a usable image are dropped."""

        def compute() -> Tensors:
            found = [self._encode(batch, batch.views) for batch in
                     progress(loader, "features of the plain views", len(loader))]  # fmt: skip
            return {name: torch.cat([own[name] for own in found]) for name in found[0]}

        kept = self._kept({"views": "plain"}, rows, compute)
        known = set(kept["sample_id"].tolist())
        empty = {name: kept[name][:0] for name in self.modalities}
        there = [row for row in rows if row.index in known]
        return Features(there, kept["present"].bool(), self._of(kept), empty)

    def augmented(
        self,
        loader: Callable[[], TrainLoader],
        features: Features,
        count: int,
        augment: AugmentConfig,
        seed: int,
    ) -> Features:
        """Add the strong views of the first epochs of a training stream.

        Args:
            loader: makes the stream of these rows, from its first batch on.
            features: of the plain views.
            count: number K of epochs; 0: none.
            augment: the stream's augmentation.
            seed: the stream's.
        """
        if not count:
            return features
        rows = features.rows
        place = {row.index: number for number, row in enumerate(rows)}

        def compute() -> Tensors:
            stream = loader()
            steps = -(-count * len(rows) // stream.batch_size)
            kept = {name: own.repeat_interleave(count, dim=0)
                    for name, own in features.plain.items()}  # fmt: skip
            for step in progress(range(steps), "features of the augmented views", steps):
                batch = next(stream)
                assert batch.strong is not None
                found = self._encode(batch, batch.strong)
                for number, sample in enumerate(found["sample_id"].tolist()):
                    epoch = (step * stream.batch_size + number) // len(rows)
                    if epoch < count and sample in place:
                        for name in self.modalities:
                            kept[name][place[sample] * count + epoch] = found[name][number]
            return kept

        how = {"views": count, "augment": asdict(augment), "seed": seed}
        kept = self._of(self._kept(how, rows, compute))
        return Features(rows, features.present, features.plain, kept)

    @torch.no_grad()
    def _encode(self, batch: PairBatch, views: Mapping[str, Tensor]) -> Tensors:
        """Compute the features of one batch, in main memory."""
        images = torch.cat([views[name] for name in self.modalities])
        half = self.precision.autocast
        with torch.autocast(images.device.type, half, enabled=half is not None):
            found = pooled(self.encoder, images, self.pool).cpu()
        parts = dict(zip(self.modalities, found.chunk(len(self.modalities)), strict=True))
        own = {"sample_id": batch.sample_id.cpu(), "present": batch.present.cpu()}
        return own | parts

    def _of(self, kept: Tensors) -> Tensors:
        return {name: kept[name] for name in self.modalities}

    def _kept(
        self, how: Mapping[str, Any], rows: Sequence[Row], compute: Callable[[], Tensors]
    ) -> Tensors:
        """Read features from their file in the folder, or compute and store them."""
        if self.folder is None:
            return compute()
        file = self.folder / f"{self._digest(how, rows)}.safetensors"
        with suppress(FileNotFoundError, SafetensorError):  # a damaged one is made anew
            return load_file(file)
        tensors = compute()
        make_folder(self.folder)
        with renamed(file) as partial:
            partial.write_bytes(save({name: own.contiguous() for name, own in tensors.items()}))
        return tensors

    def _digest(self, how: Mapping[str, Any], rows: Sequence[Row]) -> str:
        data = self.data
        facts = {
            **how,
            "weights": digest_of(self.encoder.state_dict()),
            "parts": asdict(self.encoder.parts),
            "heads": [own.heads for own in self.encoder.modules() if isinstance(own, Attention)],
            "image": self.encoder.image_size,
            "pool": self.pool,
            "arithmetic": self.precision.name,
            "normalize": [data.normalize, data.mean, data.std, data.on_bad_file, data.dtype],
            "cache": asdict(data.cache),
            "rows": [
                [row.index, *(content_of(row.files[name]) for name in self.modalities)]
                for row in rows
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors and their names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        own = tensor.detach().cpu().contiguous()
        whole.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
        whole.update(own.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def content_of(file: Path | None) -> str:
    """Return a digest of the bytes of an image; empty if there is none that can be read."""
    if file is not None:
        with suppress(OSError, RefusedImage):
            return hashlib.sha256(read_image(file).data).hexdigest()
    return ""
