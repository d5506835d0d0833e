"""What a classifier says of rows: the evidence of every view, fused, and with one view less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mics_fast.data.loaders import PairBatch
from mics_fast.models.classifier import Classifier
from mics_kernels import conflict, fuse_evidence, opinion


@dataclass
class View:
    """What one view says of the N rows it sees.

    Args:
        probability: (N, C) expected class probabilities.
        uncertainty: (N,) vacuity in [0, 1].
        label: (N,) int64, the truth; -1 = unknown.
        group: (N,) int64; rows of one group are frames of one lesion.
    """

    probability: Tensor
    uncertainty: Tensor
    label: Tensor
    group: Tensor

    def take(self, rows: Tensor) -> View:
        """The rows of an index, or of a mask."""
        return View(
            self.probability[rows], self.uncertainty[rows], self.label[rows], self.group[rows]
        )

    def same_as(self, other: View) -> bool:
        """Whether the other says the same of the same rows."""
        return torch.equal(self.probability, other.probability) and torch.equal(
            self.group, other.group
        )

    def wrong(self) -> Tensor:
        """(N,) float32: 1 where the most probable class is not the label."""
        return (self.probability.argmax(-1) != self.label).float()


@dataclass
class Opinions:
    """What a classifier says of N rows, on the CPU.

    Args:
        modalities: names of the M modalities.
        views: names of the V views: the modalities, then their fusion if there is one.
        evidence: (N, V, C) float32, non-negative; of a view that is not present, without meaning.
        present: (N, V) bool.
        without: for each modality (N, C), the fused evidence of the views that do not read it;
            empty where that was not asked for.
        label: (N,) int64, -1 = unknown.
        group: (N,) int64.
        sample_id: (N,) int64, manifest row.
    """

    modalities: tuple[str, ...]
    views: tuple[str, ...]
    evidence: Tensor
    present: Tensor
    without: dict[str, Tensor]
    label: Tensor
    group: Tensor
    sample_id: Tensor

    def fused(self) -> View:
        """The opinion of all views together, of every row."""
        fused = fuse_evidence(self.evidence, present=self.present)
        return self._view(fused, torch.ones_like(self.label, dtype=torch.bool))

    def each(self) -> dict[str, View]:
        """ "fused", and every modality on the rows that have it."""
        single = {
            name: self._view(self.evidence[:, column], self.present[:, column])
            for column, name in enumerate(self.modalities)
        }
        return {"fused": self.fused(), **single}

    def missing(self) -> dict[str, View]:
        """For each modality the fused opinion as if it were missing, on rows that have another."""
        count = self.present[:, : len(self.modalities)].sum(1)
        return {
            name: self._view(evidence, count - self.present[:, column].long() > 0)
            for column, (name, evidence) in enumerate(self.without.items())
        }

    def row(self, position: int) -> Opinions:
        """The opinions of one row alone."""
        own = slice(position, position + 1)
        return Opinions(
            self.modalities,
            self.views,
            self.evidence[own],
            self.present[own],
            {name: evidence[own] for name, evidence in self.without.items()},
            self.label[own],
            self.group[own],
            self.sample_id[own],
        )

    def conflict(self) -> Tensor:
        """(N,) how much the modalities contradict each other, in [0, 1]."""
        count = len(self.modalities)
        return conflict(self.evidence[:, :count], present=self.present[:, :count])

    def _view(self, evidence: Tensor, rows: Tensor) -> View:
        said = opinion(evidence[rows])
        return View(said.probability, said.uncertainty, self.label[rows], self.group[rows])


def gather(parts: Sequence[Opinions]) -> Opinions:
    """The opinions of all batches as one; at least one batch."""
    first = parts[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    without = {name: torch.cat([part.without[name] for part in parts]) for name in first.without}
    return Opinions(
        first.modalities,
        first.views,
        joined("evidence"),
        joined("present"),
        without,
        joined("label"),
        joined("group"),
        joined("sample_id"),
    )


@torch.no_grad()
def state_opinions(model: Classifier, batch: PairBatch, *, hide: bool = False) -> Opinions:
    """One batch through the model.

    Args:
        model: in evaluation mode.
        batch: on the model's device.
        hide: also hide each modality in turn; costs one pass of the fusion encoder each.
    """
    tokens = model.encode(batch.views, batch.present)

    def speak(present: Tensor) -> tuple[Tensor, Tensor]:
        output = model.speak(tokens, present)
        return softplus(output.logits), output.present

    evidence, present = speak(batch.present)
    without = {}
    for column, name in enumerate(model.modalities if hide else ()):
        others = batch.present.clone()
        others[:, column] = False
        spoken, there = speak(others)
        without[name] = fuse_evidence(spoken, present=there).cpu()
    return assemble(model.modalities, model.views, evidence, present, batch, without)


def assemble(
    modalities: Sequence[str],
    views: Sequence[str],
    evidence: Tensor,
    present: Tensor,
    batch: PairBatch,
    without: dict[str, Tensor] | None = None,
) -> Opinions:
    """Evidence (B, V, C) and what is known of the rows that it speaks of."""
    return Opinions(
        tuple(modalities),
        tuple(views),
        evidence.float().cpu(),
        present.cpu(),
        without or {},
        batch.label.cpu(),
        batch.group_id.cpu(),
        batch.sample_id.cpu(),
    )


def collect_opinions(
    model: Classifier, batches: Iterable[PairBatch], *, hide: bool = False
) -> Opinions:
    """All batches, at least one, through the model in evaluation mode; ``hide`` as above."""
    was_training = model.training
    model.eval()
    # Blocks compiled for training would be compiled again for the size of the last batch.
    with torch.compiler.set_stance("force_eager"):
        opinions = gather([state_opinions(model, batch, hide=hide) for batch in batches])
    model.train(was_training)
    return opinions


def records(opinions: Opinions, ids: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A record a row, as ``predict`` writes it: the fused opinion, and that of every view there.

    "class" is the most probable one; belief and uncertainty sum to 1.
    """
    fused = opinion(fuse_evidence(opinions.evidence, present=opinions.present))
    single = opinion(opinions.evidence)
    disagreement = opinions.conflict().tolist()

    def stated(belief: Tensor, uncertainty: Tensor) -> dict[str, Any]:
        return {
            "class": classes[int(belief.argmax())],
            "belief": dict(zip(classes, belief.tolist(), strict=True)),
            "uncertainty": float(uncertainty),
        }

    return [
        {
            "id": name,
            **stated(fused.belief[row], fused.uncertainty[row]),
            "conflict": disagreement[row],
            "views": {
                view: stated(single.belief[row, column], single.uncertainty[row, column])
                for column, view in enumerate(opinions.views)
                if opinions.present[row, column]
            },
        }
        for row, name in enumerate(ids)
    ]


def flat_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record as one line of a table: nested names joined by a dot."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            prefix = "" if name == "views" else f"{name}."
            flat |= {f"{prefix}{inner}": kept for inner, kept in flat_record(value).items()}
        else:
            flat[name] = value
    return flat
