"""Reading of the training images, and detection of bad ones.

DALI does not report which image of a batch failed, and cannot continue after an error. So the
images of a failed batch are decoded again, one by one, and the failing ones become suspects. A
suspect is tried before each use, with the crop of that use: the result depends on file and crop
alone (the upper half of a truncated file can be fine), not on earlier attempts, so that a resumed
run makes the same batches.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch

from mics_fast.common.errors import InputError, warn
from mics_fast.data.decoding import WHOLE, Decoder, decoded, new_pipeline
from mics_fast.data.image_header import RefusedImage
from mics_fast.data.manifest import Row
from mics_fast.data.pillow_decoding import PillowDecoder
from mics_fast.data.shards import read_image

CroppedImage = tuple[Row, str, np.ndarray]
"""Row, modality, and the crop to decode."""


class ImageFiles:
    """Reader of encoded images for one stream of batches.

    Args:
        policy: "error": the first bad file ends the stream; "skip": a bad file counts as missing.
        device: where the stream decodes.
        decoder: library that the stream decodes with.
    """

    def __init__(
        self, policy: Literal["error", "skip"], device: torch.device, decoder: Decoder
    ) -> None:
        self.policy = policy
        self._decodes = SingleDecoder(device, decoder)
        self._suspects: set[tuple[int, str]] = set()
        self._skipped: Counter[str] = Counter()
        self.problems: dict[int, str] = {}
        """Row number -> sentence about its latest bad image, under "skip"."""
        self._reported: set[str] = set()

    def read(
        self, row: Row, modality: str, crop: np.ndarray = WHOLE
    ) -> tuple[np.ndarray | None, str]:
        """Return the bytes of an image, None if missing or bad, and the sentence about a bad one.

        Raises:
            InputError: the image is bad, under "error"; names file, modality and row.
        """
        path = row.files[modality]
        if path is None:
            return None, ""
        problem = ""
        try:
            encoded = read_image(path)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        except RefusedImage as error:
            problem = str(error)
        else:
            if (row.index, modality) in self._suspects and not self._decodes(encoded, crop):
                problem = "cannot be decoded"
        if not problem:
            return encoded, ""
        sentence = f"{path} {problem}; it is the {modality} image of sample {row.id!r}"
        if self.policy == "error":
            raise InputError(sentence)
        self.problems[row.index] = sentence
        return None, sentence

    def suspect(self, images: Iterable[CroppedImage]) -> bool:
        """Decode the images of failed batches one by one, and return True if any is bad.

        Raises:
            InputError: one is bad, under "error".
        """
        found = False
        for row, modality, crop in images:
            encoded, _ = self.read(row, modality, crop)
            if encoded is not None and not self._decodes(encoded, crop):
                found = True
                self._suspects.add((row.index, modality))
                self.read(row, modality, crop)  # raises, under "error"
        return found

    def skip(self, sentences: Iterable[str]) -> None:
        """Count the skipped images of a batch, and report each file once."""
        for sentence in sentences:
            if sentence not in self._reported:
                warn(f"skipped: {sentence}")
                self._reported.add(sentence)
            self._skipped[sentence] += 1

    def report(self, what: str) -> None:
        """Report how many images were skipped in ``what``, if any, and reset the count."""
        if self._skipped:
            print(
                f"{what}: skipped {self._skipped.total()} images of {len(self._skipped)} bad files",
                file=sys.stderr,
            )
        self._skipped.clear()


class SingleDecoder:
    """Decodes one image at a time in the same way as the graph.

    Args:
        device: where the graph decodes.
        decoder: library that the graph decodes with.
    """

    def __init__(self, device: torch.device, decoder: Decoder) -> None:
        self._device, self._decoder = device, decoder
        self._pipeline: Any = None

    def __call__(self, encoded: np.ndarray, crop: np.ndarray) -> bool:
        """Return True if the crop of an image can be decoded.

        Raises:
            RuntimeError: the GPU is out of memory, which says nothing about the image.
        """
        return self._decode(encoded, crop) is not None

    def pixels(self, encoded: np.ndarray) -> np.ndarray | None:
        """Decode the whole image to (H, W, 3) uint8; None if it cannot be decoded."""
        output = self._decode(encoded, WHOLE)
        if output is None:
            return None
        return np.array(output[0] if self._decoder == "cpu" else output.as_cpu()[0])

    def _decode(self, encoded: np.ndarray, crop: np.ndarray) -> Any:
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            (output,) = self._pipeline.run(encoded=[encoded], crop=[crop])
        except RuntimeError as error:
            self._pipeline = None  # DALI cannot continue after an error
            if "CUDA allocation failed" in str(error):
                raise
            return None
        return output

    def _build(self) -> Any:
        if self._decoder == "cpu":
            return PillowDecoder(threads=1)
        from nvidia.dali import fn

        pipeline = new_pipeline(self._device, threads=1, batch_size=1, prefetch=1)
        with pipeline:
            encoded, crop = fn.external_source(name="encoded"), fn.external_source(name="crop")
            pipeline.set_outputs(decoded(encoded, self._device, crop))
        pipeline.build()
        return pipeline
