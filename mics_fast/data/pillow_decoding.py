"""Decoding with Pillow, where DALI does not exist or is not wanted: the same frames to one level.

Both classes stand in for a DALI pipeline that decodes on a CPU: they are run in the same way, and
raise RuntimeError for an image that cannot be decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from mics_fast.common.errors import InputError
from mics_fast.data.image_threads import image_workers
from mics_fast.data.images import pixels_of

Source = Callable[[int], Sequence[Sequence[Any]]]


class PillowPipeline:
    """Endless batches of frames, decoded by threads while the loop works on another batch.

    Args:
        images: batch number -> encoded images, one list per modality.
        crops: batch number -> lists of numbers, the first of which are crops; None: whole frames.
        threads: number of threads; None: as many as torch has.
        prefetch: batches decoded ahead.
    """

    def __init__(
        self, images: Source, crops: Source | None, threads: int | None, prefetch: int
    ) -> None:
        self._images, self._crops = images, crops
        self._workers = image_workers(threads)
        self._ahead: deque[list[list[Future[np.ndarray]]]] = deque()
        self._next, self._prefetch = 0, prefetch

    def run(self, stream: None = None) -> list[list[np.ndarray]]:
        """Return the (H, W, 3) uint8 frames of the next batch, one list per modality.

        Raises:
            RuntimeError: an image cannot be decoded.
        """
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._submit(self._next))
            self._next += 1
        return [[frame.result() for frame in column] for column in self._ahead.popleft()]

    def _submit(self, number: int) -> list[list[Future[np.ndarray]]]:
        columns = self._images(number)
        crops = [None] * len(columns[0]) if self._crops is None else self._crops(number)[0]
        return [
            [self._workers.submit(frame_of, *pair) for pair in zip(column, crops, strict=True)]
            for column in columns
        ]


class PillowDecoder:
    """Decoder of single batches.

    Args:
        threads: number of threads; None: as many as torch has.
    """

    def __init__(self, threads: int | None) -> None:
        self._workers = image_workers(threads)

    def run(
        self,
        stream: None = None,
        *,
        encoded: Sequence[np.ndarray],
        crop: Sequence[np.ndarray] | None = None,
    ) -> tuple[list[np.ndarray]]:
        """Return the (H, W, 3) uint8 frames of some images.

        Raises:
            RuntimeError: an image cannot be decoded.
        """
        crops = [None] * len(encoded) if crop is None else crop
        return (list(self._workers.map(frame_of, encoded, crops)),)


def frame_of(encoded: np.ndarray, crop: np.ndarray | None) -> np.ndarray:
    """Decode an image, upright, and cut a crop (left, top, width, height as fractions of it).

    Returns:
        (H, W, 3) uint8, writable.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    try:
        frame = pixels_of(encoded.tobytes(), Path("image"))
    except InputError as error:
        raise RuntimeError(str(error)) from None
    if crop is None:
        return np.array(frame)
    # In float32, and at least a pixel, as the DALI graph does.
    size = np.array([frame.shape[1], frame.shape[0]], np.float32)
    share = np.maximum(crop[2:], 1 / size)
    start = np.minimum(crop[:2], 1 - share)
    left, top = np.floor(start * size + np.float32(0.5)).astype(int)
    right, bottom = np.floor((start + share) * size + np.float32(0.5)).astype(int)
    return np.array(frame[top:bottom, left:right])
