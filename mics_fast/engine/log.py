"""The log of a run: terminal lines, a progress bar, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from mics_fast.common.errors import InputError, warn
from mics_fast.common.files import open_regular
from mics_fast.engine.distributed import rank

METRICS = "metrics.jsonl"  # in a run folder
LONGEST_LINE = 2**20  # bytes


class RunLog:
    """Writes each record to the terminal, to ``metrics.jsonl`` and to TensorBoard.

    Rank 0 logs for all ranks. A record that cannot be written is reported and skipped.

    Args:
        folder: run folder; an existing log is appended to.

    Raises:
        InputError: ``metrics.jsonl`` is a link or not a regular file, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._speaks = rank() == 0
        if self._speaks:
            self._file = LineFile(folder / METRICS)
            self._board: SummaryWriter | None = None
            with suppress(OSError):  # reported at the first record
                self._board = SummaryWriter(str(folder / "tensorboard"))
        self._bar: Progress | None = None
        self._warned: set[tuple[str, str]] = set()

    @contextmanager
    def progress(self, stage: str, step: int, steps: int) -> Iterator[None]:
        """Show a progress bar for a stage if standard output is a terminal."""
        console = Console()
        if not (self._speaks and console.is_terminal):
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console) as self._bar:
            self._bar.add_task(stage, total=steps, completed=step)
            try:
                yield
            finally:
                self._bar = None

    def write(self, stage: str, step: int, values: Mapping[str, float], progress: str) -> None:
        """Write one record of a stage and step; ``progress`` begins the terminal line."""
        if not self._speaks:
            return
        try:
            self._file.append(json.dumps({"stage": stage, "step": step, **values}))
        except OSError as error:
            reason = f"records cannot be written: {error.strerror}"
            self.warn(stage, f"{reason}; continuing without them")
        self._write_events(stage, step, values)
        shown = [
            f"{name.removeprefix('loss_')} {value:.4g}"
            for name, value in values.items()
            if name in ("loss", "lr", "gradient_norm") or name.startswith("loss_")
        ]
        print(f"{progress}  " + "  ".join(shown), flush=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def warn(self, stage: str, sentence: str) -> None:
        """Print a warning once per stage."""
        if self._speaks and (stage, sentence) not in self._warned:
            self._warned.add((stage, sentence))
            warn(f"{stage}: {sentence}")

    def close(self) -> None:
        if self._speaks:
            self._file.close()
            self._leave_board(lambda board: board.close())

    def _write_events(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        def write(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(f"{stage}/{name}", value, step)

        if not self._leave_board(write):
            self.warn(stage, "TensorBoard events cannot be written; continuing without them")

    def _leave_board(self, action: Callable[[SummaryWriter], None]) -> bool:
        """Write events; after a failure, stop writing them and return False."""
        if self._board is None:
            return False
        try:
            action(self._board)
        except OSError:
            self._board = None
            return False
        return True


class LineFile:
    """A file for appending lines, each in a single write.

    Args:
        file: a regular file, created if missing; links are not followed.

    Raises:
        InputError: it is not a regular file, or cannot be written.
    """

    def __init__(self, file: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._descriptor = os.open(file, flags, 0o600)
        except OSError as error:
            reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise InputError(f"{file} cannot be written: {reason}") from None
        about = os.fstat(self._descriptor)
        if not stat.S_ISREG(about.st_mode):
            os.close(self._descriptor)
            raise InputError(f"{file} is no regular file")
        # A killed process may have left half a line, which would swallow the next one.
        self._cut = about.st_size > 0 and os.pread(self._descriptor, 1, about.st_size - 1) != b"\n"

    def append(self, line: str) -> None:
        """Write a line.

        Raises:
            OSError: it cannot be written completely.
        """
        data = ("\n" * self._cut + line + "\n").encode()
        self._cut = True
        if os.write(self._descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._cut = False

    def close(self) -> None:
        os.close(self._descriptor)


def read_log(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Read the log of a run: stage -> its records, sorted by step.

    A resumed run repeats the steps after its last checkpoint; the later record counts. Lines that
    are not records, such as a partial one after a kill, are skipped.

    Raises:
        InputError: the log is missing or not a regular file.
    """
    stages: dict[str, dict[int, dict[str, float]]] = {}
    with open_regular(folder / METRICS) as lines:
        while line := lines.readline(LONGEST_LINE):
            record = read_record(line)
            if record is not None:
                stages.setdefault(record["stage"], {})[record["step"]] = record
    return {stage: [records[step] for step in sorted(records)] for stage, records in stages.items()}


def read_record(line: bytes) -> dict[str, Any] | None:
    """Parse the record in a line, keeping only its numbers; None if it is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("stage") not in ("pretrain", "finetune"):
        return None
    if type(record.get("step")) is not int or record["step"] < 0:
        return None
    numbers = {
        name: value
        for name, value in record.items()
        if type(value) in (int, float) and abs(value) < 2**1000
    }
    return {"stage": record["stage"], **numbers}
