"""The description of an exported model, stored in and beside it and checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mics_fast.common.errors import InputError
from mics_fast.data.views import IMAGENET_MEAN, IMAGENET_STD
from mics_fast.evaluation.operating_point import OperatingPoint, read_operating_point
from mics_fast.models.classifier import FUSION, check_modality_names
from mics_fast.options import DataConfig

LARGEST_IMAGE = 4096  # pixels; a larger value means a damaged file

NORMALIZE_MEANING = {
    "fixed": "(x / 255 - mean) / std, per channel",
    "image": "(x - m) / sqrt(v + 1), m and v mean and variance of the image's channel",
}


@dataclass(frozen=True)
class Description:
    """The facts that a program needs to feed an exported model and to read its outputs.

    Args:
        modalities: In input order.
        views: Names of the opinions, in the order of the output "evidence".
        classes: In output order.
        image_size: Side of the images, pixels.
        normalize: "fixed" or "image".
        mean, std: Modality -> three channel values in [0, 1], for "fixed".
        point: Calibration (already applied to the outputs) and referral rule.
    """

    modalities: tuple[str, ...]
    views: tuple[str, ...]
    classes: tuple[str, ...]
    image_size: int
    normalize: Literal["fixed", "image"]
    mean: Mapping[str, tuple[float, ...]]
    std: Mapping[str, tuple[float, ...]]
    point: OperatingPoint

    @property
    def data(self) -> DataConfig:
        """Return the normalisation options for the loaders."""
        mean = cast(dict[str, tuple[float, float, float]], dict(self.mean))
        std = cast(dict[str, tuple[float, float, float]], dict(self.std))
        return DataConfig(normalize=self.normalize, mean=mean, std=std)

    def text(self) -> str:
        """Return the description as canonical JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "point"}
        return json.dumps({**fields, "operating_point": self.point.json()})


def describe_model(
    modalities: tuple[str, ...],
    views: tuple[str, ...],
    classes: tuple[str, ...],
    image_size: int,
    data: DataConfig,
    point: OperatingPoint,
) -> Description:
    """Make the description of a model for export."""
    mean = {name: tuple(data.mean.get(name, IMAGENET_MEAN)) for name in modalities}
    std = {name: tuple(data.std.get(name, IMAGENET_STD)) for name in modalities}
    return Description(modalities, views, classes, image_size, data.normalize, mean, std, point)


def read_description(values: Any, whose: object) -> Description:
    """Check a description read from a file.

    Args:
        values: Parsed JSON with the fields of ``Description``.
        whose: The file, for the message.

    Raises:
        InputError: a field is missing or invalid.
    """
    if not isinstance(values, dict):
        raise InputError(f"{whose} is not that of an exported model: no JSON object")

    def want(condition: bool, field: str, wanted: str) -> None:
        if not condition:
            given = json.dumps(values.get(field))[:80]
            raise InputError(f"{whose} has {field} {given}, wanted {wanted}")

    for field in ("modalities", "views", "classes"):
        want(is_name_list(values.get(field)), field, "a list of different names")
    modalities, views = values["modalities"], values["views"]
    check_modality_names(modalities)
    stated = [*modalities, FUSION] if len(modalities) > 1 else modalities
    want(views == stated, "views", f"the modalities{', then fusion' * (len(modalities) > 1)}")
    want(len(values["classes"]) > 1, "classes", "at least two")
    size: Any = values.get("image_size")
    whole = isinstance(size, int) and not isinstance(size, bool)
    want(whole and 0 < size <= LARGEST_IMAGE, "image_size", f"a number from 1 to {LARGEST_IMAGE}")
    want(values.get("normalize") in tuple(NORMALIZE_MEANING), "normalize", "fixed or image")
    for field, low in (("mean", -math.inf), ("std", 0.0)):
        given: Any = values.get(field)
        fits = isinstance(given, dict) and set(given) == set(modalities)
        fits = fits and all(is_channels(own, low) for own in given.values())
        want(fits, field, "three finite numbers per modality" + ", above 0" * (field == "std"))
    return Description(
        tuple(modalities),
        tuple(views),
        tuple(values["classes"]),
        size,
        values["normalize"],
        {name: tuple(map(float, own)) for name, own in values["mean"].items()},
        {name: tuple(map(float, own)) for name, own in values["std"].items()},
        read_operating_point(values.get("operating_point"), values["classes"], whose),
    )


def is_name_list(value: Any) -> bool:
    """Return True if a value is a list of distinct, non-empty strings."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(own, str) and own for own in value) and len({*value}) == len(value)


def is_channels(value: Any, low: float) -> bool:
    """Return True if a value is a list of three finite numbers above ``low``."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(
            isinstance(own, int | float)
            and not isinstance(own, bool)
            and math.isfinite(own)
            and own > low
            for own in value
        )
    )
