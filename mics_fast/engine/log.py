"""What a run says: a line and a progress bar, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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

from mics_fast.engine.distributed import rank


class RunLog:
    """Writes each record to the terminal, to ``metrics.jsonl`` and to TensorBoard.

    Of several ranks the first one speaks for all, and the others are silent.

    Args:
        folder: run folder; a log that is already there is appended to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._speaks = rank() == 0
        if self._speaks:
            self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (see close)
            self._board = SummaryWriter(str(folder / "tensorboard"))
        self._bar: Progress | None = None
        self._warned: set[tuple[str, str]] = set()

    @contextmanager
    def progress(self, stage: str, step: int, steps: int) -> Iterator[None]:
        """Show a bar while a stage runs, where standard output is a terminal; lines go above it."""
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
        """One record: ``values`` under ``stage`` and ``step``; ``progress`` opens the line."""
        if not self._speaks:
            return
        self._file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)
        shown = [
            f"{name.removeprefix('loss_')} {value:.4g}"
            for name, value in values.items()
            if name in ("loss", "lr", "gradient_norm") or name.startswith("loss_")
        ]
        print(f"{progress}  " + "  ".join(shown), flush=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def warn(self, stage: str, sentence: str) -> None:
        """Say something that a person should look at, once a stage."""
        if self._speaks and (stage, sentence) not in self._warned:
            self._warned.add((stage, sentence))
            print(f"{stage}: {sentence}", file=sys.stderr)

    def close(self) -> None:
        if self._speaks:
            self._file.close()
            self._board.close()


def read_log(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What a run has logged: stage -> its records, by step.

    A run that was killed repeats the steps after its last checkpoint: the last record counts; and
    may have left half a line behind, which is passed over.
    """
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        stages.setdefault(record["stage"], {})[record["step"]] = record
    return {stage: [records[step] for step in sorted(records)] for stage, records in stages.items()}
