"""Is pre-training working? Whether the nearest labelled rows share the class of a val row.

The features are those that fine-tuning starts from: the student encoder's, pooled, without the
projection. Nothing is trained, and only labels that fine-tuning may use are read.
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
MOST_ROWS = 2000  # of each side: a check costs at most as many forward passes as 4,000 pairs take


@dataclass
class Features:
    """Features of n rows.

    Args:
        values: (n, M, D) float32, of length 1; of an absent modality, without meaning.
        present: (n, M) bool.
        label: (n,) int64.
    """

    values: Tensor
    present: Tensor
    label: Tensor

    def mean(self) -> tuple[Tensor, Tensor]:
        """(n, D), of length 1: the mean over the modalities that are there; and (n,) bool."""
        kept = self.values.masked_fill(~self.present.unsqueeze(-1), 0.0)
        return F.normalize(kept.sum(1), dim=-1), self.present.any(1)


def neighbour_accuracy(
    model: PretrainModel,
    labelled: Iterable[PairBatch],
    val: Iterable[PairBatch],
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Share of val rows whose class a vote of their nearest labelled rows names.

    Args:
        model: of the first stage; left as it is.
        labelled: the rows that vote.
        val: the rows that are asked about; their labels are the truth.
        autocast: dtype of the encoder's arithmetic, None for float32.

    Returns:
        ``knn_accuracy`` of the mean feature of the modalities, ``knn_accuracy_<modality>`` of each
        where there are several; without those for which there is no row on one of the sides.
    """
    keys, queries = (extract_features(model, batches, autocast) for batches in (labelled, val))
    views = {"knn_accuracy": (*keys.mean(), *queries.mean())}
    if len(model.modalities) > 1:
        for m, name in enumerate(model.modalities):
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
    """The class that the nearest keys vote for, each with the weight exp(cosine / 0.07).

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
    """The student's features of all rows of some batches."""
    values, present, label = [], [], []
    # Blocks compiled for training would be compiled again, without gradients and for the size of
    # the last batch.
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


def bounded(rows: Sequence[Row]) -> list[Row]:
    """At most ``MOST_ROWS`` of the rows, in their order: the same ones each time, drawn at random
    so that a manifest in the order of its classes keeps their shares."""
    return [rows[place] for place in sorted(epoch_order(0, 0, len(rows))[:MOST_ROWS])]


def in_words(scores: dict[str, float]) -> str:
    """The scores on one line."""
    return "  ".join(f"{name.replace('_', ' ')} {score:.1%}" for name, score in scores.items())
