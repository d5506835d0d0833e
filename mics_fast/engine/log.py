"""What a run says: a progress line, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Writes each record to the terminal, to ``metrics.jsonl`` and to TensorBoard.

    Args:
        folder: run folder; a log that is already there is appended to.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed below)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: Mapping[str, float], progress: str) -> None:
        """One record: ``values`` under ``stage`` and ``step``; ``progress`` opens the line."""
        self._file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)
        terms = [
            f"{name.removeprefix('loss_')} {value:.4g}"
            for name, value in values.items()
            if name == "loss" or name.startswith("loss_")
        ]
        print(f"{progress}  " + "  ".join(terms), flush=True)

    def close(self) -> None:
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


class Timer:
    """Counts pairs, and how long the training waited for them.

    Args:
        before: seconds that earlier processes spent on this run.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._last = time.perf_counter()
        self._start = self._last - before
        self._waited = 0.0
        self._pairs = 0

    def add(self, pairs: int, waited: float) -> None:
        self._pairs += pairs
        self._waited += waited

    def read(self) -> dict[str, float]:
        """``seconds`` since the beginning; since the last ``restart``, ``pairs_per_second`` and
        the share of the time that waited for data."""
        now = time.perf_counter()
        elapsed = max(now - self._last, 1e-9)
        return {
            "seconds": now - self._start,
            "pairs_per_second": self._pairs / elapsed,
            "data_wait": self._waited / elapsed,
        }

    def restart(self) -> None:
        self._last, self._waited, self._pairs = time.perf_counter(), 0.0, 0
