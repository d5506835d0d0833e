"""Prediction: answers of a trained or exported classifier about samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mics_fast.common.errors import InputError, warn
from mics_fast.common.progress import progress
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row
from mics_fast.evaluation.answers import Answer, Failure, answer
from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.referral import Rule
from mics_fast.inference.ensemble import Ensemble
from mics_fast.inference.exported_classifier import SIDECAR, ExportedClassifier
from mics_fast.inference.loaded_classifier import LoadedClassifier
from mics_fast.inference.run_classifier import load_run
from mics_fast.inference.samples import Images, array_batch, named_rows, stored_rows
from mics_fast.training.run import Run

ARRAYS = 16  # samples per batch of arrays


@dataclass(frozen=True)
class Predictor:
    """A classifier ready for prediction; ``mics_fast.load`` makes one.

    Args:
        classifier: From a run, exported, or an ensemble.
    """

    classifier: LoadedClassifier

    @staticmethod
    def load(*folders: Path) -> Predictor:
        """Load run folders or folders of ``python -m mics_fast.export``; several answer as one.

        Raises:
            InputError: a folder is neither, or is damaged; or they are of different models.
        """
        loaded = [load_classifier(folder) for folder in folders]
        if len(loaded) == 1:
            return Predictor(loaded[0])
        stored = [folder for folder, own in zip(folders, loaded, strict=True) if own.point.rule]
        if stored:
            warn(
                f"warning: the rule stored in {stored[0]} holds for that run alone and is not "
                "used; give a threshold for the ensemble with --refer-above"
            )
        return Predictor(Ensemble.of(loaded, folders))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the images that a sample may have; one of them suffices."""
        return self.classifier.modalities

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.classifier.classes

    def point(self, refer_above: float | None = None) -> OperatingPoint:
        """Return the stored calibration and referral rule, or a rule with the given threshold."""
        stored = self.classifier.point
        if refer_above is None:
            return stored
        rule = Rule("uncertainty", refer_above)
        return replace(stored, rule=rule, target=None, predictive_values={})

    def predict(
        self,
        source: str | os.PathLike[str] | Images | Sequence[Images],
        *,
        refer_above: float | None = None,
    ) -> list[Answer | Failure]:
        """Answer for each sample.

        Args:
            source: A manifest; a folder with one folder of images per modality; one sample as
                modality -> file or (H, W, 3) uint8 array; or a list of such samples, all files or
                all arrays.
            refer_above: Largest vacuity in [0, 1] that is not referred to a person; default: the
                rule stored by ``evaluate --target-risk``, if any.

        Returns:
            One record per sample, in order. A sample with an unreadable image gets a record of "id"
            and "error".

        Raises:
            InputError: the source is invalid, or none of its samples can be read.

        Examples:
            >>> model = mics_fast.load("runs/demo")  # doctest: +SKIP
            >>> model.predict({"wli": "a.png", "nbi": "b.png"})[0]["class"]  # doctest: +SKIP
            'plaque-green'
        """
        if isinstance(source, str | os.PathLike):
            rows = stored_rows(Path(source), self.modalities)
            return list(self.answers(rows, refer_above=refer_above))
        samples = [source] if isinstance(source, Mapping) else source
        files = [isinstance(image, str | os.PathLike) for own in samples for image in own.values()]
        if any(files) and not all(files):
            raise InputError("the samples are both files and arrays, wanted one or the other")
        if any(files):
            rows = named_rows(samples, self.modalities)
            return list(self.answers(rows, refer_above=refer_above))
        return list(self._array_answers(samples, refer_above))

    def answers(
        self, rows: Sequence[Row], *, refer_above: float | None = None
    ) -> Iterator[Answer | Failure]:
        """Yield an answer or a failure for each row, in order, batch by batch.

        Raises:
            InputError: no row can be read.
        """
        loader = self.classifier.loader(rows, replace(self.classifier.data, on_bad_file="skip"))
        waiting, answered = iter(rows), False
        try:
            for batch in progress(loader, "predicting", len(loader)):
                numbers = batch.sample_id.tolist()
                stated = dict(zip(numbers, self._state(batch, refer_above), strict=True))
                for row in waiting:
                    failure = failure_of(row, loader)
                    answered = answered or failure is None
                    yield failure or {**stated[row.index], "id": row.id}  # type: ignore[misc]
                    if row.index == numbers[-1]:
                        break
        except InputError:
            if not loader.problems:
                raise
        rest = [failure_of(row, loader) for row in waiting]
        if rows and not answered:
            raise InputError(next(iter(loader.problems.values())))
        yield from filter(None, rest)

    def _array_answers(
        self, samples: Sequence[Images], refer_above: float | None
    ) -> Iterator[Answer]:
        own = self.classifier
        for start in range(0, len(samples), ARRAYS):
            part = samples[start : start + ARRAYS]
            batch = array_batch(part, own.modalities, own.data, own.image_size)
            batch.views = {name: view.to(own.device) for name, view in batch.views.items()}
            batch.present = batch.present.to(own.device)
            for number, stated in enumerate(self._state(batch, refer_above), start):
                yield {**stated, "id": str(number)}

    def _state(self, batch: PairBatch, refer_above: float | None) -> list[Answer]:
        names = [str(number) for number in batch.sample_id.tolist()]
        point = self.point(refer_above)
        return answer(self.classifier.state(batch), names, self.classes, point)


def load_classifier(folder: Path) -> LoadedClassifier:
    """Load one run folder, or one folder of ``python -m mics_fast.export``.

    Raises:
        InputError: the folder is neither, or is damaged.
    """
    if (folder / SIDECAR).exists():
        return ExportedClassifier.open(folder)
    return load_run(Run.open(folder))


def failure_of(row: Row, loader: EvalLoader) -> Failure | None:
    """Explain why a row has no answer; None if all its images were read."""
    problem = loader.problems.get(row.index)
    return None if problem is None else {"id": row.id, "error": problem}
