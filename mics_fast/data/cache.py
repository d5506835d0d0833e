"""Cache of decoded frames, so that only the first epoch reads and decodes files.

A cached frame is the whole frame as uint8, resized to a square a little larger than the views. It
replaces the decoded image in the first epoch, too, so batches do not depend on which frames are
already cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.data.decoding import (
    WHOLE,
    consumer,
    decoded,
    decoder_of,
    new_pipeline,
    resized,
    to_torch,
)
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.image_threads import image_workers
from mics_fast.data.pillow_decoding import PillowDecoder
from mics_fast.data.resize import resized_square
from mics_fast.data.rows import Row, indices_of
from mics_fast.engine.distributed import processes_here
from mics_fast.options import DataConfig

_LARGEST_BATCH = 64  # frames decoded at once
_UNKNOWN, _KEPT, _ABSENT = range(3)


class FrameCache:
    """The frames of some rows, each decoded on first use.

    Args:
        rows: rows whose frames are cached.
        modalities: names.
        data: threads, policy for bad files, place and side of the cached frames.
        image_size: side of the views, pixels.
        device: training device.

    Raises:
        InputError: the frames do not fit in the free memory.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        modalities: Sequence[str],
        *,
        data: DataConfig,
        image_size: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder_of(data, device)
        self.modalities, self.threads, self._device = modalities, data.threads, device
        self._on_gpu = device.type == "cuda"
        self.device = device if data.cache.mode == "device" else torch.device("cpu")
        self.side = data.cache.side or round(image_size * 256 / 224)
        self.files = ImageFiles(data.on_bad_file, device, self._decoder)
        numbers = indices_of(rows)
        self._place = np.empty(numbers.max(initial=-1) + 1, np.int64)  # row number -> its frames
        self._place[numbers] = np.arange(len(rows))
        self._state = np.full((len(rows), len(modalities)), _UNKNOWN, np.uint8)
        self._problems: dict[tuple[int, int], str] = {}
        shape = (len(rows), len(modalities), self.side, self.side, 3)
        check_memory(shape, self.device)
        self._frames = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self._blank = torch.zeros(shape[2:], dtype=torch.uint8, device=self.device)
        self._pipeline: Any = None
        self._workers = image_workers(data.threads)

    def fill(self, rows: Sequence[Row]) -> None:
        """Decode the frames of some rows that are not yet cached.

        Raises:
            InputError: a file cannot be read or decoded, and the policy is not "skip".
        """
        wanted = [
            (row, column)
            for row in {row.index: row for row in rows}.values()
            for column in range(len(self.modalities))
            if self._state[self._place[row.index], column] == _UNKNOWN
        ]
        for start in range(0, len(wanted), _LARGEST_BATCH):
            self._decode(wanted[start : start + _LARGEST_BATCH])

    def frame(self, row: Row, modality: str) -> tuple[np.ndarray | Tensor | None, str]:
        """Return the (side, side, 3) uint8 frame of a filled row, None if missing or bad, and the
        sentence about a bad one."""
        place, column = self._place[row.index], self.modalities.index(modality)
        kept = self._state[place, column] == _KEPT
        frame = self._view(self._frames[place, column]) if kept else None
        return frame, self._problems.get((place, column), "")

    def blank(self) -> np.ndarray | Tensor:
        """Return a black frame to stand for a missing one."""
        return self._view(self._blank)

    def _view(self, frame: Tensor) -> np.ndarray | Tensor:
        """Return the same memory in the form that DALI takes: a torch tensor only on a GPU."""
        return frame if frame.is_cuda else frame.numpy()

    def _decode(self, wanted: Sequence[tuple[Row, int]]) -> None:
        """Decode and store the frames of at most ``_LARGEST_BATCH`` images."""
        readable = []
        for row, column in wanted:
            place = self._place[row.index]
            encoded, problem = self.files.read(row, self.modalities[column])
            if encoded is not None:
                readable.append((row, column, encoded))
                continue
            self._state[place, column] = _ABSENT
            if problem:
                self._problems[place, column] = problem
        if not readable:
            return
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
            images = [encoded for _, _, encoded in readable]
            (frames,) = self._pipeline.run(consumer(self._device), encoded=images)
        except RuntimeError:
            self._pipeline = None  # DALI cannot continue after an error
            suspects = [(row, self.modalities[column], WHOLE) for row, column, _ in readable]
            if not self.files.suspect(suspects):
                raise
            return self._decode([(row, column) for row, column, _ in readable])
        places = [(self._place[row.index], column) for row, column, _ in readable]
        squares: Iterable[Tensor]
        if self._on_gpu:
            squares = to_torch(frames, self._device).to(self.device)
        else:
            squares = self._workers.map(self._square, frames)
        for where, square in zip(places, squares, strict=True):
            self._frames[where].copy_(square)
            self._state[where] = _KEPT

    def _square(self, frame: Any) -> Tensor:
        """Resize a decoded frame to (side, side, 3) uint8."""
        square = resized_square(torch.from_dlpack(frame), self.side, WHOLE)
        return square.permute(1, 2, 0).to(torch.uint8)

    def _build(self) -> Any:
        if self._decoder == "cpu":
            return PillowDecoder(self.threads)
        from nvidia.dali import fn

        pipeline = new_pipeline(self._device, self.threads, _LARGEST_BATCH, prefetch=1)
        with pipeline:
            encoded = fn.external_source(name="encoded")
            frame = decoded(encoded, self._device)
            pipeline.set_outputs(resized(frame, self.side) if self._on_gpu else frame)
        pipeline.build()
        return pipeline


def check_memory(shape: Sequence[int], device: torch.device) -> None:
    """Check that the cache fits before anything is decoded.

    Each process has a cache of its own, so those of one machine share its free memory equally.

    Raises:
        InputError: a uint8 array of this shape does not fit in this process's free memory.
    """
    needed = int(np.prod(shape, dtype=np.int64))
    if device.type == "cuda":
        free, place, whose = torch.cuda.mem_get_info(device)[0], "GPU", ""
    else:
        processes = processes_here()
        free, place = free_host_memory() // processes, "main"
        whose = f" for each of the {processes} processes of this machine" if processes > 1 else ""
    if needed > free:
        rows, modalities, side = shape[:3]
        raise InputError(
            f"option data.cache.mode needs {gibibytes(needed)} for {rows} rows of {modalities} "
            f"frames of {side} x {side} pixels, but {gibibytes(free)} of {place} memory are free"
            f"{whose}; wanted a smaller data.cache.side, or the mode none"
        )


def free_host_memory() -> int:
    """Return the bytes still available from the system and this process's control group."""
    with open("/proc/meminfo") as file:
        kilobytes = dict(line.split(":") for line in file)["MemAvailable"].split()[0]
    free = int(kilobytes) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no limit, or another version of control groups
        return free


def gibibytes(count: int) -> str:
    """Format a number of bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"
