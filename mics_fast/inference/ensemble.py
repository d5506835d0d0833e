"""Several classifiers that answer as one, such as those of the folds of a cross-validation.

The evidence of each opinion is averaged over the classifiers, then the opinions are fused. For
Dirichlet opinions this is averaging belief fusion (Josang, Subjective Logic, 2016, section 12.5),
the rule for sources that judge the same observation; Dempster's rule, which takes sources for
independent, would count the same image once per classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mics_fast.common.errors import InputError
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import Opinions
from mics_fast.inference.loaded_classifier import LoadedClassifier
from mics_fast.options import DataConfig

SAME = ("modalities", "heads", "classes", "image_size")
SAME_DATA = ("normalize", "mean", "std", "dtype")


@dataclass(frozen=True)
class Ensemble:
    """Classifiers with the same modalities, classes and preprocessing.

    Args:
        members: At least one.
    """

    members: tuple[LoadedClassifier, ...]

    @staticmethod
    def of(members: Sequence[LoadedClassifier], names: Sequence[object]) -> Ensemble:
        """Check that classifiers can answer as one.

        Args:
            members: At least one.
            names: What to call each in a message.

        Raises:
            InputError: names the first difference.
        """
        first, *others = members
        for own, name in zip(others, names[1:], strict=True):
            both = (names[0], name)
            for field in SAME:
                refuse_difference(field, (getattr(first, field), getattr(own, field)), both)
            for field in SAME_DATA:
                values = getattr(first.data, field), getattr(own.data, field)
                refuse_difference(f"data.{field}", values, both)
        return Ensemble(tuple(members))

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.members[0].modalities

    @property
    def heads(self) -> tuple[str, ...]:
        return self.members[0].heads

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].classes

    @property
    def data(self) -> DataConfig:
        return self.members[0].data

    @property
    def image_size(self) -> int:
        return self.members[0].image_size

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def point(self) -> OperatingPoint:
        """No calibration and no rule: those of a run hold for that run alone."""
        return OperatingPoint()

    def loader(self, rows: Sequence[Row], data: DataConfig | None = None) -> EvalLoader:
        """Make batches of whole frames, normalised as in training."""
        return self.members[0].loader(rows, data)

    def state(self, batch: PairBatch) -> Opinions:
        """State the mean opinions of the members on one batch."""
        stated = [own.state(moved(batch, own.device)) for own in self.members]
        mean = torch.stack([own.evidence for own in stated]).mean(0)
        return replace(stated[0], evidence=mean)


def moved(batch: PairBatch, device: torch.device) -> PairBatch:
    """Bring the images of a batch to a device."""
    views = {name: view.to(device) for name, view in batch.views.items()}
    return replace(batch, views=views, present=batch.present.to(device))


def refuse_difference(
    what: str, values: tuple[object, object], names: tuple[object, object]
) -> None:
    """Refuse two classifiers that differ.

    Args:
        what: The field that is compared.
        values: Of both.
        names: Of both, for the message.

    Raises:
        InputError: the values differ.
    """
    if values[0] != values[1]:
        raise InputError(
            f"{names[0]} and {names[1]} cannot answer as one: {what} is {values[0]!r} and "
            f"{values[1]!r}, wanted the same"
        )
