"""The operating point in a run folder: ``operating_point.json``, written by ``evaluate``."""

from __future__ import annotations

from pathlib import Path

from mics_fast.common.errors import warn
from mics_fast.common.files import read_json, write_json
from mics_fast.engine.checkpoint import read_meta
from mics_fast.evaluation.operating_point import OperatingPoint, read_operating_point

FILE = "operating_point.json"


def store_point(folder: Path, checkpoint: Path, point: OperatingPoint) -> Path:
    """Write the operating point of a run's checkpoint.

    Raises:
        InputError: the file cannot be written.
    """
    write_json(folder / FILE, {"checkpoint": read_meta(checkpoint)["sha256"], **point.json()})
    return folder / FILE


def stored_point(folder: Path, checkpoint: Path, classes: tuple[str, ...]) -> OperatingPoint:
    """Read the operating point of a run's checkpoint; an empty one if none was chosen.

    An operating point of another checkpoint is reported and ignored.

    Raises:
        InputError: the file is invalid.
    """
    file = folder / FILE
    if not file.exists():
        return OperatingPoint()
    values = read_json(file)
    point = read_operating_point(values, classes, file)
    if values.get("checkpoint") != read_meta(checkpoint)["sha256"]:
        warn(
            f"warning: {file} is of another checkpoint and is not used; evaluate again with "
            "--target-risk"
        )
        return OperatingPoint()
    return point
