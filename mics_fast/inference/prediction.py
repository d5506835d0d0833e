"""Prediction: opens a model, finds the rows, states a record per row, writes and shows them."""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.table import Table

from mics_fast.common.errors import InputError
from mics_fast.common.files import whole_file
from mics_fast.data.images import SUFFIXES
from mics_fast.data.loaders import EvalLoader, PairBatch
from mics_fast.data.manifest import Row, read_manifest
from mics_fast.evaluation.opinions import Opinions, flat_record, records
from mics_fast.evaluation.tables import wide_console
from mics_fast.inference.exported_model import SIDECAR, Exported
from mics_fast.inference.run_model import load_trained, progress
from mics_fast.preparation.sources import images_by_key
from mics_fast.training.run import Run

REFER = "refer to a person"
ROWS_SHOWN = 20

Write = Callable[[dict[str, Any]], None]


class Model(Protocol):
    """A run's classifier, or one that was exported."""

    @property
    def modalities(self) -> tuple[str, ...]: ...

    @property
    def views(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def loader(self, rows: Sequence[Row]) -> EvalLoader: ...

    def answer(self, batch: PairBatch) -> Opinions: ...


def open_model(folder: Path) -> Model:
    """The classifier of a run folder, or the one that was exported to a folder.

    Raises:
        InputError: there is none.
    """
    if (folder / SIDECAR).exists():
        return Exported.open(folder)
    return load_trained(Run.open(folder))


def find_rows(
    options: argparse.Namespace, images: dict[str, Path], modalities: Sequence[str]
) -> Sequence[Row]:
    """What to look at: the rows of a manifest, of a folder, or the one sample named.

    Raises:
        InputError: a file or folder is missing or empty, or of a modality the model does not know.
    """
    if options.manifest:
        return read_manifest(options.manifest, modalities).rows
    if options.folder:
        return folder_rows(options.folder, modalities)
    for name, file in images.items():
        if name not in modalities:
            raise InputError(
                f"option --{name} is unknown: the modalities of {options.model} are "
                f"{', '.join(modalities)}"
            )
        if not file.is_file():
            raise InputError(f"--{name} {file} does not exist, wanted an image")
    return [sample(0, next(iter(images.values())).stem, images, modalities)]


def folder_rows(folder: Path, modalities: Sequence[str]) -> list[Row]:
    """Images in folders called <modality> or <name>_<modality>, matched by name and stem.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"--folder {folder} is not a folder")
    found: dict[str, dict[str, Path]] = {}
    # With one modality, its images may lie in the folder itself.
    places = [(folder, modalities[0], "")] if len(modalities) == 1 else []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in modalities:
            prefix, separator, ending = f"_{place.name}".lower().rpartition(f"_{name}".lower())
            if separator and not ending:
                places.append((place, name, f"{place.name[: len(prefix) - 1]}/" if prefix else ""))
    for place, name, prefix in places:
        for file in images_by_key(place, None).values():
            found.setdefault(prefix + file.stem, {})[name] = file
    if not found:
        raise InputError(
            f"--folder {folder} holds no image, wanted folders called "
            f"{' or '.join(modalities)} with files that end in {', '.join(sorted(SUFFIXES))}"
        )
    return [
        sample(index, name, files, modalities)
        for index, (name, files) in enumerate(sorted(found.items()))
    ]


def sample(index: int, name: str, files: dict[str, Path], modalities: Sequence[str]) -> Row:
    """A row without a label."""
    return Row(
        index=index,
        id=name,
        label=-1,
        labelled=False,
        group=index,
        split="test",
        virtual=(),
        files={modality: files.get(modality) for modality in modalities},
    )


def predict(
    model: Model, rows: Sequence[Row], refer_above: float | None = None
) -> Iterator[dict[str, Any]]:
    """A record a row, batch by batch: see ``opinions.records``.

    Where the uncertainty is above ``refer_above``, "class" is "refer to a person"; with that
    option every record also has "refer" and "most_probable".

    Raises:
        InputError: an image cannot be read or decoded.
    """
    loader = model.loader(rows)
    names = {row.index: row.id for row in rows}
    for batch in progress(loader, "predicting", len(loader)):
        batch_names = [names[index] for index in batch.sample_id.tolist()]
        for record in records(model.answer(batch), batch_names, model.classes):
            yield record if refer_above is None else referred(record, refer_above)


def referred(record: dict[str, Any], above: float) -> dict[str, Any]:
    """The record with the answer that a threshold on its uncertainty gives."""
    refer = record["uncertainty"] > above
    return {
        **record,
        "class": REFER if refer else record["class"],
        "most_probable": record["class"],
        "refer": refer,
    }


@contextmanager
def json_list(file: Path) -> Iterator[Write]:
    """One JSON list of all records."""
    with whole_file(file) as handle:
        separator = "["

        def write(record: dict[str, Any]) -> None:
            nonlocal separator
            handle.write(f"{separator}\n{json.dumps(record)}")
            separator = ","

        yield write
        handle.write("\n]\n")


@contextmanager
def json_lines(file: Path) -> Iterator[Write]:
    """One JSON object a line."""
    with whole_file(file) as handle:
        yield lambda record: print(json.dumps(record), file=handle)


@contextmanager
def table_file(file: Path, model: Model, refers: bool) -> Iterator[Write]:
    """A CSV whose columns are the same whatever is missing: belief.<class>, wli.class, ..."""
    stated = {"class": "", "belief": dict.fromkeys(model.classes, 0.0), "uncertainty": 0.0}
    whole = {"id": "", **stated, "conflict": 0.0, "views": dict.fromkeys(model.views, stated)}
    columns = [*flat_record(whole), *(("most_probable", "refer") if refers else ())]
    with whole_file(file) as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        yield lambda record: writer.writerow(flat_record(record))


def print_answers(
    shown: Sequence[dict[str, Any]], answers: Counter[str], modalities: Iterable[str]
) -> None:
    """The first samples as a table, and how often each answer was given."""
    count = sum(answers.values())
    title = f"samples: {count}" if count <= len(shown) else f"the first {len(shown)} of {count}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("id")
    table.add_column("class")
    for name in ("belief", "uncertainty", "conflict"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in modalities:
        table.add_column(f"{name} alone")
    for column in table.columns:
        column.overflow = "fold"  # a class name is never cut short
    for record in shown:
        numbers = (max(record["belief"].values()), record["uncertainty"], record["conflict"])
        alone = (record["views"].get(name) for name in modalities)
        table.add_row(
            record["id"],
            record["class"],
            *(f"{value:.2f}" for value in numbers),
            *(opinion["class"] if opinion else "missing" for opinion in alone),
        )
    wide_console().print(table)
    print(", ".join(f"{name}: {number}" for name, number in answers.most_common()))
