"""The DALI graph: from file bytes and augmentation numbers to normalised views.

One graph serves GPU (``mixed`` decode) and CPU. Per modality: decode the crop alone, resize it to
a square (triangle filter, antialiased), flip it; then per view, weak or strong, which share all of
that: colour, blur, normalise. Images stay uint8 until they are normalised, so every operation
rounds and clips to 0..255. An evaluation view is the whole frame resized to the square: the
geometry of training with the largest crop, no flip, no colour.

The colour of a pixel x = (r, g, b) in 0..255 becomes

    brightness * (contrast * T x + 128 * (1 - contrast)),  T = Y^-1 R(hue) diag(1, s, s) Y

where Y goes from RGB to YIQ, s is the saturation factor and R turns the (I, Q) plane by the hue.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mics_fast.config import AugmentConfig, ColourConfig, DataConfig
from mics_fast.data.augment import BLUR, BRIGHTNESS, CONTRAST, HUE, SATURATION
from mics_fast.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PREFETCH = 2
"""Batches in flight: while the caller works on one, the next is made."""

# Added to the variance in squared grey levels: the rounding of a flat channel stays small.
_VARIANCE_FLOOR = 1.0
# DALI refuses a standard deviation of 0; this one changes nothing.
_SMALLEST_BLUR = 1e-3

Source = Callable[[Any], tuple[np.ndarray, ...]]
"""DALI's SampleInfo -> encoded image of each modality; then, where the graph augments, the fields
of an ``Augmentation`` in their order, ``strong`` only where the graph makes the strong view."""


@dataclass(frozen=True)
class PairGraph:
    """What becomes of a pair of encoded images, whatever files and numbers they come with.

    Args:
        modalities: names, in the order of the source's images.
        data: normalisation and threads.
        image_size: side of the views, pixels.
        device: where images are decoded and views live.
        augment: how pairs are changed; None: the evaluation view.
        strong: also make the strong view.

    Raises:
        InputError: DALI is not installed, or a standard deviation is not positive.
    """

    modalities: Sequence[str]
    data: DataConfig
    image_size: int
    device: torch.device
    augment: AugmentConfig | None = None
    strong: bool = False

    def __post_init__(self) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            raise InputError(
                "NVIDIA DALI cannot be imported, wanted: pip install 'mics-fast[train]' on Linux"
            ) from None
        for name in self.modalities:
            std = self.data.std.get(name, IMAGENET_STD)
            if min(std) <= 0:
                raise InputError(f"option data.std of {name} is {std}, wanted numbers above 0")

    def build(self, source: Source, batch_size: int) -> Any:
        """A running pipeline: each output holds one view of one modality, weak views first."""
        from nvidia.dali import fn

        colours = self._colours()
        count = len(self.modalities)
        numbers = 3 + len(colours) if colours else 0
        pipeline = self._pipeline(batch_size, PREFETCH)
        with pipeline:
            inputs = fn.external_source(source=source, num_outputs=count + numbers, batch=False)
            frames = [self._frame(image, *inputs[count : count + 3]) for image in inputs[:count]]
            views = frames if not colours else []
            for values, config in zip(inputs[count + 3 :], colours, strict=True):
                views += [_coloured(frame, values[i], config) for i, frame in enumerate(frames)]
            names = itertools.cycle(self.modalities)
            pipeline.set_outputs(*map(self._normalised, views, names))
        pipeline.build()
        return pipeline

    def first_undecodable(self, encoded: Iterable[np.ndarray]) -> int | None:
        """Position of the first image that the graph's decoder refuses, None where it takes all.

        DALI does not say which image of a batch it stumbled on.
        """
        from nvidia.dali import fn

        pipeline = self._pipeline(batch_size=1, prefetch=1)
        with pipeline:
            node = fn.external_source(name="encoded")
            pipeline.set_outputs(fn.decoders.image(node, **self._decoder()))
        for position, image in enumerate(encoded):
            try:
                pipeline.run(encoded=[image])
            except RuntimeError:
                return position
        return None

    def _pipeline(self, batch_size: int, prefetch: int) -> Any:
        from nvidia.dali import Pipeline

        device = None
        if self.device.type == "cuda":
            device = self.device.index
            device = torch.cuda.current_device() if device is None else device
        return Pipeline(
            batch_size=batch_size,
            num_threads=self.data.threads,
            device_id=device,
            prefetch_queue_depth=prefetch,
        )

    def _decoder(self) -> dict[str, Any]:
        from nvidia.dali import types

        device = "mixed" if self.device.type == "cuda" else "cpu"
        return {"device": device, "output_type": types.DALIImageType.RGB}

    def _colours(self) -> list[ColourConfig]:
        """The ranges of each view that is coloured."""
        if self.augment is None:
            return []
        return [self.augment.weak, self.augment.strong] if self.strong else [self.augment.weak]

    def _frame(self, encoded: Any, anchor: Any = None, shape: Any = None, flip: Any = None) -> Any:
        """The crop, or the whole frame, as a flipped uint8 square."""
        from nvidia.dali import fn, types

        if anchor is None:
            frame = fn.decoders.image(encoded, **self._decoder())
        else:
            frame = fn.decoders.image_slice(encoded, anchor, shape, **self._decoder())
        square: Any = fn.resize(
            frame,
            size=(self.image_size, self.image_size),
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
        if flip is None:
            return square
        return fn.flip(square, horizontal=flip[0], vertical=flip[1])

    def _normalised(self, image: Any, modality: str) -> Any:
        """(3, H, W) float32."""
        from nvidia.dali import fn, types

        if self.data.normalize == "image":
            image = fn.normalize(image, axes=[0, 1], epsilon=_VARIANCE_FLOOR)
            return fn.transpose(image, perm=[2, 0, 1])
        return fn.crop_mirror_normalize(
            image,
            mean=[255 * x for x in self.data.mean.get(modality, IMAGENET_MEAN)],
            std=[255 * x for x in self.data.std.get(modality, IMAGENET_STD)],
            dtype=types.DALIDataType.FLOAT,
            output_layout="CHW",
        )


def _coloured(image: Any, numbers: Any, config: ColourConfig) -> Any:
    """One view of one modality, changed by its (5,) colour numbers."""
    from nvidia.dali import fn, math

    image = fn.color_twist(
        image,
        brightness=numbers[BRIGHTNESS],
        contrast=numbers[CONTRAST],
        saturation=numbers[SATURATION],
        hue=numbers[HUE],
    )
    if not config.blur:
        return image
    return fn.gaussian_blur(image, sigma=math.max(numbers[BLUR], _SMALLEST_BLUR))
