"""k-nearest-neighbour check of pre-training: do labelled neighbours predict the class of val rows?

The features are the starting point of fine-tuning: pooled outputs of the student encoder, without
the projection. Nothing is trained, and only labels available to fine-tuning are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mics_fast.data.augmentation import epoch_order
from mics_fast.data.loaders import PairBatch
from mics_fast.data.manifest import Row
from mics_fast.models.pretraining import PretrainModel
from mics_fast.models.vit import pool_tokens

NEIGHBOURS, TEMPERATURE = 20, 0.07
MOST_ROWS = 2000  # per side, so that a check costs at most the forward passes of 4,000 pairs


@dataclass
class Features:
    """Features of n rows.

    Args:
        values: (n, M, D) float32, of length 1; undefined for an absent modality.
        present: (n, M) bool.
        label: (n,) int64.
    """

    values: Tensor
    present: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Features:
        """Move the features to a device."""
        return Features(self.values.to(device), self.present.to(device), self.label.to(device))

    def mean(self) -> tuple[Tensor, Tensor]:
        """Average over the present modalities, (n, D) of length 1; mark rows with any, (n,)."""
        kept = self.values.masked_fill(~self.present.unsqueeze(-1), 0.0)
        return F.normalize(kept.sum(1), dim=-1), self.present.any(1)


def neighbour_accuracy(
    keys: Features, queries: Features, modalities: Sequence[str]
) -> dict[str, float]:
    """Classify val rows by a vote of their nearest labelled rows.

    Args:
        keys: of the labelled rows, which vote.
        queries: of the val rows; their labels are the truth.
        modalities: names of the M modalities.

    Returns:
        ``knn_accuracy`` for the mean feature of the modalities and, if there are several,
        ``knn_accuracy_<modality>``; scores without rows on one of the sides are omitted.
    """
    views = {"knn_accuracy": (*keys.mean(), *queries.mean())}
    if len(modalities) > 1:
        for m, name in enumerate(modalities):
            views[f"knn_accuracy_{name}"] = (
                keys.values[:, m], keys.present[:, m], queries.values[:, m], queries.present[:, m]
            )  # fmt: skip
    scores = {}
    for name, (theirs, there, ours, here) in views.items():
        if there.any() and here.any():
            found = vote(ours[here], theirs[there], keys.label[there])
            scores[name] = (found == queries.label[here]).float().mean().item()
    return scores


def vote(queries: Tensor, keys: Tensor, label: Tensor) -> Tensor:
    """Return the class with most votes of the nearest keys, each weighted by exp(cosine / 0.07).

    Args:
        queries: (n, D), of length 1.
        keys: (m, D), of length 1.
        label: (m,) int64, of the keys.

    Returns:
        (n,) int64.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    CVPR 2018, section 3.4, with the 20 neighbours of DINO (Caron et al., ICCV 2021).
    """
    nearest = (queries @ keys.T).topk(min(NEIGHBOURS, len(keys)), dim=1)
    weight = ((nearest.values - 1) / TEMPERATURE).exp()
    classes = int(label.max()) + 1
    votes = weight.new_zeros(len(queries), classes)
    return votes.scatter_add_(1, label[nearest.indices], weight).argmax(1)


@torch.no_grad()
def extract_features(
    model: PretrainModel, batches: Iterable[PairBatch], autocast: torch.dtype | None
) -> Features:
    """Extract the student's features of all rows.

    Args:
        model: of the first stage; unchanged.
        batches: at least one.
        autocast: dtype of the encoder's arithmetic, None for float32.
    """
    values, present, label = [], [], []
    # Compiled blocks would be recompiled without gradients, and for the size of the last batch.
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            images = torch.cat([batch.views[name] for name in model.modalities])
            with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
                pooled = pool_tokens(model.encoder(images), model.pool)
            feature = F.normalize(pooled.float(), dim=-1)
            values.append(feature.unflatten(0, (len(model.modalities), -1)).transpose(0, 1))
            present.append(batch.present)
            label.append(batch.label)
    return Features(torch.cat(values), torch.cat(present), torch.cat(label))


def joined_features(parts: Sequence[Features]) -> Features:
    """Concatenate features of one or more sets of rows."""
    return Features(
        torch.cat([part.values for part in parts]),
        torch.cat([part.present for part in parts]),
        torch.cat([part.label for part in parts]),
    )


def bounded(rows: Sequence[Row]) -> list[Row]:
    """Draw at most ``MOST_ROWS`` rows, always the same ones, and keep their order; the draw keeps
    the class shares of a manifest sorted by class."""
    return [rows[place] for place in sorted(epoch_order(0, 0, len(rows))[:MOST_ROWS])]
