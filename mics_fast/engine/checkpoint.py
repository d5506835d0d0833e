"""Checkpoints: one folder per step, complete, atomic, loaded without executing code.

A checkpoint is written under a hidden name and renamed when complete, so a kill leaves no partial
one under its name; a checksum detects later damage:

    checkpoints/<stage>/step-00001200/state.pt    tensors and plain numbers (``weights_only``)
    checkpoints/<stage>/step-00001200/meta.json   identity of the model, checksum of state.pt
    checkpoints/<stage>/best.json                 the step with the best score on the val rows
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from mics_fast.common.errors import InputError, warn
from mics_fast.common.files import open_regular, read_json, renamed
from mics_fast.common.tensors import check_size, load_tensors

MOST_NAMES = 10_000  # limit of classes, and of modalities


class CheckpointState(TypedDict):
    """Content of ``state.pt``.

    Args:
        step: optimiser steps so far.
        stage: ``state_dict`` of the stage.
        optimisers: name -> ``state_dict``.
        scaler: ``state_dict`` of the loss scaler; None without one.
        skipped_steps: steps that the scaler skipped.
        rng: state of the CPU's random generator.
        seconds: wall time of training so far.
        scores: ``state_dict`` of ``engine.scores.Scores``; absent in older checkpoints.
    """

    step: int
    stage: dict[str, Any]
    optimisers: dict[str, dict[str, Any]]
    scaler: dict[str, Any] | None
    skipped_steps: float
    rng: Tensor
    seconds: float
    scores: NotRequired[dict[str, Any]]


class Best(TypedDict):
    """Content of ``best.json``: the step with the best score."""

    step: int
    score: float


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read, or differs from what was written."""


class HashingFile:
    """A writable file that computes the SHA-256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error  # torch.save turns it into a RuntimeError
            raise

    def flush(self) -> None:
        self._file.flush()

    def checksum(self) -> str:
        return self._hash.hexdigest()


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        folder: ``RUN/checkpoints/<stage>``; created by the first save.
        keep: number of latest checkpoints to keep, beside the best.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: CheckpointState, meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, unless this step already has one.

        Raises:
            OSError: it cannot be written; earlier checkpoints are unaffected.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return target
        partial = self.folder / f".partial-step-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write_state(partial, state, {**meta, "step": step})
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune()
        return target

    def load_latest(self, expected: Mapping[str, Any]) -> CheckpointState | None:
        """Load the latest intact checkpoint; None if there is none.

        A damaged one is reported on stderr and moved aside; remains of a killed save are removed.

        Raises:
            InputError: the checkpoint is of another model.
        """
        for partial in self.folder.glob(".partial-step-*"):
            shutil.rmtree(partial, ignore_errors=True)
        for path in reversed(self._steps()):
            try:
                return load_checkpoint(path, expected)
            except DamagedCheckpoint as error:
                warn(f"{error}; resuming from the previous one")
                damaged = path.with_name(f".damaged-{path.name}")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
        return None

    def offer_best(self, step: int, score: float) -> None:
        """Mark this step as the best if its score is the highest so far."""
        best = self._best()
        if best is not None and best["score"] >= score:
            return
        with renamed(self.folder / "best.json") as partial:
            partial.write_text(json.dumps({"step": step, "score": score}))
        self._prune()

    def latest(self) -> Path | None:
        """Return the folder of the latest checkpoint, None if there is none."""
        steps = self._steps()
        return steps[-1] if steps else None

    def best(self) -> Path | None:
        """Return the checkpoint with the best score; the latest if none was scored."""
        best = self._best()
        return self.latest() if best is None else self.folder / f"step-{best['step']:08d}"

    def best_step(self) -> int | None:
        """Return the step with the best score; None if none was scored."""
        best = self._best()
        return None if best is None else best["step"]

    def _best(self) -> Best | None:
        path = self.folder / "best.json"
        if not path.exists():
            return None
        best = read_json(path)
        if not (
            isinstance(best, dict)
            and type(best.get("step")) is int
            and type(best.get("score")) in (int, float)
            and best["step"] >= 0
        ):
            raise InputError(f"{path} is damaged, wanted a step and its score; remove it")
        return cast(Best, best)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _prune(self) -> None:
        best = self.best()
        for path in self._steps()[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def load_checkpoint(path: Path, expected: Mapping[str, Any]) -> CheckpointState:
    """Read a checkpoint folder onto the CPU.

    Args:
        path: the checkpoint's folder.
        expected: entries of ``meta.json`` that must match (stage, model, modalities, classes).

    Raises:
        DamagedCheckpoint: the folder is not a checkpoint, or is unreadable.
        InputError: the checkpoint is of another model.
    """
    meta = read_meta(path)
    for key, wanted in expected.items():
        if meta.get(key) != wanted:
            raise InputError(
                f"checkpoint {path} is of another model: its {key} is {meta.get(key)!r}, "
                f"wanted {wanted!r}"
            )
    file = path / "state.pt"
    try:
        with open_regular(file) as opened:
            check_size(opened)  # before a sparse one is read for its checksum
            found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != meta["sha256"]:
                raise DamagedCheckpoint(f"checkpoint {file} cannot be read: its checksum is wrong")
            state = load_tensors(opened)
    except DamagedCheckpoint:
        raise
    except InputError as error:
        raise DamagedCheckpoint(f"checkpoint {error}") from None
    except Exception as error:  # torch raises many kinds of errors
        reason = " ".join(str(error).split())
        raise DamagedCheckpoint(f"checkpoint {file} cannot be read: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DamagedCheckpoint(f"checkpoint {file} holds no named state")
    return cast(CheckpointState, state)


def weights_of(state: CheckpointState, part: str) -> dict[str, Any]:
    """Return the weights of one part of a stage, such as "average", without the part's prefix.

    Raises:
        DamagedCheckpoint: the state has no named weights.
    """
    prefix, stage = f"{part}.", state.get("stage")
    if not isinstance(stage, dict) or not all(isinstance(name, str) for name in stage):
        raise DamagedCheckpoint("the checkpoint holds no named weights of a stage")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in stage.items()
        if name.startswith(prefix)
    }


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Convert the errors of loading a state that does not fit.

    Args:
        what: subject of the sentence, such as "checkpoint PATH".

    Raises:
        DamagedCheckpoint: the state does not fit.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DamagedCheckpoint(f"{what} does not fit what was built for it: {reason}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """Read the ``meta.json`` of a checkpoint.

    Raises:
        DamagedCheckpoint: the folder is not a checkpoint.
    """
    try:
        meta = read_json(path / "meta.json")
    except InputError as error:
        raise DamagedCheckpoint(f"{path} is not a checkpoint: {error}") from None
    if not is_meta(meta):
        raise DamagedCheckpoint(f"{path} is not a checkpoint: meta.json is damaged")
    return meta


def is_meta(meta: Any) -> bool:
    """Return True if a value has the entries of ``meta.json``, with their types."""
    if not isinstance(meta, dict) or not isinstance(meta.get("sha256"), str):
        return False
    names = [meta.get(kind, []) for kind in ("modalities", "classes")]
    return all(
        isinstance(own, list)
        and len(own) <= MOST_NAMES
        and len(set(map(str, own))) == len(own)
        and all(isinstance(name, str) for name in own)
        for own in names
    )


def write_state(folder: Path, state: CheckpointState, meta: Mapping[str, Any]) -> None:
    """Write state.pt, flushed to the disk, and meta.json with its checksum."""
    with open(folder / "state.pt", "wb") as file:
        hashing = HashingFile(file)
        try:
            torch.save(dict(state), cast(BinaryIO, hashing))  # it only writes and flushes
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    text = json.dumps({**meta, "sha256": hashing.checksum()}, indent=1)
    (folder / "meta.json").write_text(text)
