"""Samples for prediction: rows of a manifest, images of a folder, named files, or arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mics_fast.common.errors import InputError
from mics_fast.data.batch import PairBatch
from mics_fast.data.image_files import WHOLE
from mics_fast.data.images import SUFFIXES
from mics_fast.data.manifest import Row, read_manifest
from mics_fast.data.resize import resized_square
from mics_fast.data.views import make_view
from mics_fast.options import DataConfig
from mics_fast.preparation.sources import images_by_key

Images = Mapping[str, str | os.PathLike[str] | np.ndarray]
"""Modality -> image file, or image of shape (H, W, 3) uint8."""


def stored_rows(place: Path, modalities: Sequence[str]) -> Sequence[Row]:
    """Read the samples of a manifest or a folder.

    Raises:
        InputError: the place is neither, or is invalid.
    """
    if place.is_dir():
        return folder_rows(place, modalities)
    # Missing files only affect their own rows.
    return read_manifest(place, modalities, files_exist=False).rows


def folder_rows(folder: Path, modalities: Sequence[str]) -> list[Row]:
    """Match images by stem in folders named <modality> or <name>_<modality>.

    Raises:
        InputError: the folder does not exist, or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"--folder {folder} is not a folder")
    found: dict[str, dict[str, Path]] = {}
    # With one modality, the images may lie in the folder itself.
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
        file_row(index, name, files, modalities)
        for index, (name, files) in enumerate(sorted(found.items()))
    ]


def file_row(index: int, name: str, files: Mapping[str, Path], modalities: Sequence[str]) -> Row:
    """Make a row without a label."""
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


def named_rows(samples: Sequence[Images], modalities: Sequence[str]) -> list[Row]:
    """Make a row for each sample of image files; its id is the stem of its first file.

    Raises:
        InputError: an unknown modality, or a sample without images.
    """
    rows = []
    for index, images in enumerate(samples):
        check_modalities(images, modalities)
        files = {name: Path(os.fspath(file)) for name, file in images.items()}  # type: ignore[arg-type]
        rows.append(file_row(index, next(iter(files.values())).stem, files, modalities))
    return rows


def array_batch(
    samples: Sequence[Images], modalities: Sequence[str], data: DataConfig, image_size: int
) -> PairBatch:
    """Make a batch from arrays, resized and normalised as files are.

    Args:
        samples: Modality -> (H, W, 3) uint8 RGB, upright, the whole frame.
        modalities: In the model's order.
        data: Normalisation.
        image_size: Side of the views, pixels.

    Raises:
        InputError: an unknown modality, no image, or a wrong shape or dtype.
    """
    shape = (len(samples), 3, image_size, image_size)
    views = {name: torch.zeros(shape) for name in modalities}
    present = torch.zeros(len(samples), len(modalities), dtype=torch.bool)
    for index, images in enumerate(samples):
        check_modalities(images, modalities)
        for name, image in images.items():
            square = resized_square(frame_of(image, name), image_size, WHOLE)
            views[name][index] = make_view(square.contiguous()[None], name, data, None)[0]
            present[index, modalities.index(name)] = True
    numbers = torch.arange(len(samples))
    unknown = torch.full((len(samples),), -1)
    return PairBatch(
        views=views,
        strong=None,
        present=present,
        label=unknown,
        labelled=torch.zeros(len(samples), dtype=torch.bool),
        sample_id=numbers,
        group_id=numbers,
    )


def frame_of(image: Any, modality: str) -> torch.Tensor:
    """Check an array and convert it to a tensor, (H, W, 3) uint8.

    Raises:
        InputError: a wrong shape or dtype.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise InputError(
            f"the {modality} array has shape {array.shape} and type {array.dtype}, wanted "
            "(height, width, 3) and uint8"
        )
    return torch.from_numpy(np.array(array))


def check_modalities(images: Images, modalities: Sequence[str]) -> None:
    """Refuse a sample with unknown modalities, or without images.

    Raises:
        InputError: names the modality.
    """
    for name in images:
        if name not in modalities:
            raise InputError(
                f"modality {name} is unknown: those of the model are {', '.join(modalities)}"
            )
    if not images:
        raise InputError(f"a sample has no image, wanted {' or '.join(modalities)}")
