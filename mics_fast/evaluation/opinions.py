"""The opinions of a classifier about rows, and the predictions derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mics_fast.data.loaders import PairBatch
from mics_fast.models.classifier import Classifier, ClassifierOutput
from mics_kernels import conflict, fuse_evidence, opinion


class Source(NamedTuple):
    """The source of predictions: the fused opinion, one modality, or all modalities but one.

    Args:
        name: "fused" or a modality.
        missing: True for the fused opinion with that modality hidden.
    """

    name: str
    missing: bool = False

    def __str__(self) -> str:
        return f"without {self.name}" if self.missing else self.name


FUSED = Source("fused")


@dataclass
class Predictions:
    """Predictions of one opinion for N rows, with the true labels.

    Args:
        probability: Expected class probabilities, (N, C).
        uncertainty: Vacuity in [0, 1], (N,).
        label: True classes, (N,) int64; -1 marks unknown ones.
        group: Groups, (N,) int64; rows of one group are frames of one lesion.
    """

    probability: Tensor
    uncertainty: Tensor
    label: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> Predictions:
        """Select rows by index or mask."""
        return Predictions(
            self.probability[rows], self.uncertainty[rows], self.label[rows], self.group[rows]
        )

    def same_as(self, other: Predictions) -> bool:
        """Return True if both make the same predictions for the same rows."""
        return torch.equal(self.probability, other.probability) and torch.equal(
            self.group, other.group
        )

    def wrong(self) -> Tensor:
        """Mark with 1 the rows whose most probable class is not the label, (N,) float32."""
        return (self.probability.argmax(-1) != self.label).float()


@dataclass
class Opinions:
    """The opinions of a classifier on N rows, on the CPU.

    Args:
        modalities: Names of the M modalities.
        heads: Names of the V opinions: the modalities, then "fusion" if there are several.
        evidence: Evidence of each opinion, (N, V, C) float32; undefined where not present.
        present: (N, V) bool, True where an opinion was stated.
        without: Modality -> fused evidence (N, C) of the opinions that do not read it; empty
            unless requested.
        label: Classes, (N,) int64; -1 marks unknown ones.
        group: Groups, (N,) int64.
        sample_id: Manifest rows, (N,) int64.
    """

    modalities: tuple[str, ...]
    heads: tuple[str, ...]
    evidence: Tensor
    present: Tensor
    without: dict[str, Tensor]
    label: Tensor
    group: Tensor
    sample_id: Tensor

    def fused_evidence(self) -> Tensor:
        """Combine the opinions of each row by Dempster's rule, (N, C)."""
        return fuse_evidence(self.evidence, present=self.present)

    def fused(self) -> Predictions:
        """Predict from all opinions together, for every row."""
        return self._predictions(self.fused_evidence(), torch.ones_like(self.label).bool())

    def predictions(self) -> dict[Source, Predictions]:
        """Predict from the fused opinion, from each modality, and with each modality hidden;
        opinions without rows are omitted."""
        every = {FUSED: self.fused()}
        for column, name in enumerate(self.modalities):
            evidence, there = self.evidence[:, column], self.present[:, column]
            every[Source(name)] = self._predictions(evidence, there)
        count = self.present[:, : len(self.modalities)].sum(1)
        for name, evidence in self.without.items():
            there = self.present[:, self.modalities.index(name)]
            every[Source(name, missing=True)] = self._predictions(evidence, count > there.long())
        return {source: own for source, own in every.items() if len(own)}

    def row(self, position: int) -> Opinions:
        """Select one row."""
        own = slice(position, position + 1)
        return Opinions(
            self.modalities,
            self.heads,
            self.evidence[own],
            self.present[own],
            {name: evidence[own] for name, evidence in self.without.items()},
            self.label[own],
            self.group[own],
            self.sample_id[own],
        )

    def conflict(self) -> Tensor:
        """Measure the conflict between the modalities, (N,) in [0, 1]."""
        count = len(self.modalities)
        return conflict(self.evidence[:, :count], present=self.present[:, :count])

    def _predictions(self, evidence: Tensor, rows: Tensor) -> Predictions:
        stated = opinion(evidence[rows])
        return Predictions(
            stated.probability, stated.uncertainty, self.label[rows], self.group[rows]
        )


def gather(parts: Sequence[Opinions]) -> Opinions:
    """Concatenate the opinions of one or more batches."""
    first = parts[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    without = {name: torch.cat([part.without[name] for part in parts]) for name in first.without}
    return Opinions(
        first.modalities,
        first.heads,
        joined("evidence"),
        joined("present"),
        without,
        joined("label"),
        joined("group"),
        joined("sample_id"),
    )


def mirrored(views: Mapping[str, Tensor], flips: bool) -> Iterator[dict[str, Tensor]]:
    """Yield the views (B, 3, H, W) as they are and, with ``flips``, mirrored in three ways."""
    for dims in ((), (3,), (2,), (2, 3)) if flips else ((),):
        yield {name: view.flip(dims) if dims else view for name, view in views.items()}


@torch.no_grad()
def state_opinions(
    model: Classifier, batch: PairBatch, *, hide: bool = False, flips: bool = False
) -> Opinions:
    """Run one batch through the model.

    Args:
        model: In evaluation mode.
        batch: On the model's device.
        hide: Also hide each modality in turn, at the cost of one fusion pass per modality.
        flips: Average the evidence of each opinion over the images and three mirror images of
            them, at four times the cost.
    """
    tokens = [model.encode(views, batch.present) for views in mirrored(batch.views, flips)]

    def speak(present: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [model.speak(own, present) for own in tokens]
        return mean_evidence(outputs), outputs[0].present

    evidence, present = speak(batch.present)
    without = {}
    for column, name in enumerate(model.modalities if hide else ()):
        others = batch.present.clone()
        others[:, column] = False
        spoken, there = speak(others)
        without[name] = fuse_evidence(spoken, present=there).cpu()
    return assemble(model.modalities, model.views, evidence, present, batch, without)


def mean_evidence(outputs: Sequence[ClassifierOutput]) -> Tensor:
    """Average the evidence (B, V, C) of outputs on views of the same images."""
    if len(outputs) == 1:
        return softplus(outputs[0].logits)
    return torch.stack([softplus(own.logits) for own in outputs]).mean(0)


def assemble(
    modalities: Sequence[str],
    heads: Sequence[str],
    evidence: Tensor,
    present: Tensor,
    batch: PairBatch,
    without: dict[str, Tensor] | None = None,
) -> Opinions:
    """Combine evidence (B, V, C) with labels, groups and sample ids of its rows."""
    return Opinions(
        tuple(modalities),
        tuple(heads),
        evidence.float().cpu(),
        present.cpu(),
        without or {},
        batch.label.cpu(),
        batch.group_id.cpu(),
        batch.sample_id.cpu(),
    )


def collect_opinions(
    model: Classifier, batches: Iterable[PairBatch], *, hide: bool = False, flips: bool = False
) -> Opinions:
    """Run one or more batches through the model in evaluation mode; see ``state_opinions``."""
    was_training = model.training
    model.eval()
    # Compiled blocks would be recompiled for the size of the last batch.
    with torch.compiler.set_stance("force_eager"):
        opinions = gather(
            [state_opinions(model, batch, hide=hide, flips=flips) for batch in batches]
        )
    model.train(was_training)
    return opinions
