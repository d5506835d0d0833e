"""Experiment trackers that a run may also log to: Weights & Biases and MLflow, where installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mics_fast.common.errors import InputError
from mics_fast.common.files import read_json, write_json

FILE = "trackers.json"  # in a run folder: tracker -> its id of the run
PROJECT = "mics-fast"
MOST_PARAMETERS = 100  # that an MLflow server takes in one request


class Tracker(Protocol):
    """Where records go beside the run folder."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run of Weights & Biases; a run that is resumed goes on in the same one.

    Args:
        module: ``wandb``.
        folder: Run folder.
        options: Of the run, flat.
        known: The id that this run has there; None: it is new.
    """

    def __init__(
        self, module: Any, folder: Path, options: Mapping[str, Any], known: str | None
    ) -> None:
        self._run = module.init(
            project=PROJECT,
            name=folder.name,
            dir=str(folder),
            config=dict(options),
            id=known,
            resume="allow",
        )
        self.id = str(self._run.id)
        for stage in ("pretrain", "finetune"):  # each counts its own steps
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        own = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({f"{stage}/step": step, **own})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow; arguments as for ``Wandb``."""

    def __init__(
        self, module: Any, folder: Path, options: Mapping[str, Any], known: str | None
    ) -> None:
        self._module = module
        module.set_experiment(PROJECT)
        run = module.start_run(run_id=known, run_name=None if known else folder.name)
        self.id = str(run.info.run_id)
        items = list(options.items()) if known is None else []
        for start in range(0, len(items), MOST_PARAMETERS):
            module.log_params(dict(items[start : start + MOST_PARAMETERS]))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        own = {f"{stage}/{name}": value for name, value in values.items()}
        self._module.log_metrics(own, step=step)

    def close(self) -> None:
        self._module.end_run()


TRACKERS: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


def tracker_module(name: str) -> Any:
    """Import the package of a tracker.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"option log.{name} is true, but {name} is not installed: pip install {name}"
        ) from None


def open_trackers(
    names: Sequence[str], folder: Path, options: Mapping[str, Any]
) -> dict[str, Tracker]:
    """Start a run in each tracker, or resume the one that the run folder names.

    Raises:
        InputError: a tracker is not installed, or cannot begin.
    """
    file = folder / FILE
    known = read_json(file) if names and file.exists() else {}
    opened: dict[str, Tracker] = {}
    for name in names:
        module = tracker_module(name)
        try:
            tracker = TRACKERS[name](module, folder, options, known.get(name))
        except Exception as error:  # of whatever kind: a server, a login, a disk
            reason = " ".join(str(error).split())
            raise InputError(f"option log.{name}: a run cannot begin: {reason}") from None
        opened[name], known[name] = tracker, tracker.id
    if names:
        write_json(file, known)
    return opened
