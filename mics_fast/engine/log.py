"""The log of a run: terminal lines, a progress bar, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import errno
import json
import os
import stat
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mics_fast.common.errors import InputError, warn
from mics_fast.common.files import open_regular
from mics_fast.engine.distributed import rank
from mics_fast.engine.trackers import open_trackers

METRICS = "metrics.jsonl"  # in a run folder
LONGEST_LINE = 2**20  # bytes
WIDTH = 100  # columns of the terminal that lines are made for


class RunLog:
    """Writes each record to the terminal, to ``metrics.jsonl`` and to TensorBoard.

    Rank 0 logs for all ranks. A record that cannot be written is reported and skipped.

    Args:
        folder: run folder; an existing log is appended to.
        verbose: also print every loss, throughput and floating-point operations.
        options: of the run, flat, for TensorBoard and trackers.
        trackers: names of those to log to as well, see ``engine.trackers``.

    Raises:
        InputError: ``metrics.jsonl`` is a link or not a regular file, or cannot be written; a
            tracker cannot begin.
    """

    def __init__(
        self,
        folder: Path,
        *,
        verbose: bool = False,
        options: Mapping[str, Any] | None = None,
        trackers: Sequence[str] = (),
    ) -> None:
        self.folder, self.verbose = folder, verbose
        self._speaks = rank() == 0
        if self._speaks:
            self._file = LineFile(folder / METRICS)
            self._board: SummaryWriter | None = None
            with suppress(OSError):  # reported at the first record
                self._board = SummaryWriter(str(folder / "tensorboard"))
            self._write_options(options or {})
            self._trackers = open_trackers(trackers, folder, options or {})
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
                   TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
        # Steps may take minutes: the estimate looks back further than rich's 30 s.
        with Progress(
            *columns, console=console, transient=True, speed_estimate_period=600
        ) as self._bar:
            self._bar.add_task(stage, total=steps, completed=step)
            try:
                yield
            finally:
                self._bar = None

    def advance(self, step: int) -> None:
        """Move the bar, if there is one, to a step."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def detail(self, parts: Sequence[str]) -> None:
        """Print what only ``verbose`` shows, indented and no wider than ``WIDTH``."""
        if self._speaks and self.verbose:
            text = "  ".join(part.replace(" ", "\xa0") for part in parts)  # parts stay whole
            lines = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
            print("\n".join(lines).replace("\xa0", " "), flush=True)

    def write(
        self,
        stage: str,
        step: int,
        values: Mapping[str, float],
        line: str,
        details: Sequence[str] = (),
    ) -> None:
        """Write one record.

        Args:
            stage, step: what it is about.
            values: all of it, for ``metrics.jsonl`` and TensorBoard.
            line: what the terminal shows of it.
            details: what it shows beside that where ``verbose``.
        """
        if not self._speaks:
            return
        try:
            self._file.append(json.dumps({"stage": stage, "step": step, **values}))
        except OSError as error:
            reason = f"records cannot be written: {error.strerror}"
            self.warn(stage, f"{reason}; continuing without them")
        self._write_events(stage, step, values)
        self._track(stage, step, values)
        print(line, flush=True)
        if details:
            self.detail(details)

    def pictures(self, stage: str, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Add pictures to the TensorBoard events; title -> (3, H, W) uint8."""

        def write(board: SummaryWriter) -> None:
            for title, picture in pictures.items():
                board.add_image(f"{stage}/{title}", picture, step)

        if self._speaks:
            self._leave_board(write)

    def warn(self, stage: str, sentence: str) -> None:
        """Print a warning once per stage."""
        if self._speaks and (stage, sentence) not in self._warned:
            self._warned.add((stage, sentence))
            warn(f"{stage}: {sentence}")

    def close(self) -> None:
        if self._speaks:
            self._file.close()
            self._leave_board(lambda board: board.close())
            for tracker in self._trackers.values():
                with suppress(Exception):  # a server that is gone: the run folder has it all
                    tracker.close()

    def _write_options(self, options: Mapping[str, Any]) -> None:
        """Show the options on TensorBoard's page of hyperparameters."""
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in options.items()
        }

        def write(board: SummaryWriter) -> None:
            assert board.file_writer is not None  # open until the board is closed
            for summary in hparams(plain, {}):
                board.file_writer.add_summary(summary)

        if plain:
            self._leave_board(write)

    def _track(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write a record to the trackers; one that fails is reported and left out from then on."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(stage, step, values)
            except Exception as error:  # of whatever kind
                reason = " ".join(str(error).split())
                self.warn(stage, f"{name} cannot be written to: {reason}; going on without it")
                del self._trackers[name]

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
