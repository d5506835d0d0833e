"""The DALI graph: from images and augmentation numbers to decoded frames or square ones.

Per modality it decodes the crop alone. On a GPU (``mixed`` decode) it goes on: resize to a square
(triangle filter, antialiased), flipped; then blur for each view, weak or strong, that is to be
blurred. On a CPU, where DALI's resize takes as long as its decoder, ``resize.py`` does the same to
each frame, and frames that are kept decoded need no graph. Images stay uint8, so every operation
rounds. An evaluation view is the whole frame resized to the square: the geometry of training with
the largest crop and no flip. Colour and normalisation follow in ``views.py``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.data.augmentation import BLUR, Augmentation, View, union
from mics_fast.data.views import IMAGENET_STD
from mics_fast.engine.threads import available_threads, share_threads
from mics_fast.options import AugmentConfig, DataConfig

WHOLE = np.array([0, 0, 1, 1], np.float32)
"""The crop that is the whole frame (left, top, width, height as fractions of it), and its region
(top, left, bottom, right)."""

# DALI refuses a standard deviation of 0; this one changes nothing.
_SMALLEST_BLUR = 1e-3

Source = Callable[[int], Sequence[Sequence[Any]]]
"""Number of the batch since the graph was built -> lists of arrays, one per sample."""


@dataclass(frozen=True)
class PairGraph:
    """The steps from a pair of images to its views, the same for all files and numbers.

    Args:
        modalities: names, in the order of the source's images.
        data: normalisation, threads and batches in flight.
        image_size: side of the views, pixels.
        device: where images are decoded and views live.
        augment: how pairs are changed; None: the evaluation view.
        strong: also make the strong view.
        kept: where frames are that come decoded, as (H, W, 3) uint8; None: images come encoded.
        teacher: also make the teacher's view, of a crop of its own.

    Raises:
        InputError: DALI is not installed, or a standard deviation is not positive.
    """

    modalities: Sequence[str]
    data: DataConfig
    image_size: int
    device: torch.device
    augment: AugmentConfig | None = None
    strong: bool = False
    kept: torch.device | None = None
    teacher: bool = False

    def __post_init__(self) -> None:
        check_dali()
        for name in self.modalities:
            std = self.data.std.get(name, IMAGENET_STD)
            if min(std) <= 0:
                raise InputError(f"option data.std of {name} is {std}, wanted numbers above 0")

    @property
    def resizes(self) -> bool:
        """Whether frames leave the graph as squares, blurred where they are to be."""
        return self.device.type == "cuda"

    @property
    def runs(self) -> bool:
        """Whether there is anything for a graph to do."""
        return self.kept is None or self.resizes

    @property
    def views(self) -> list[View]:
        """The views of each image, the weak (or evaluation) view first."""
        wanted: list[tuple[View, bool]] = [("strong", self.strong), ("teacher", self.teacher)]
        return ["weak", *(view for view, made in wanted if made)]

    @property
    def crops(self) -> list[View]:
        """The views that have a crop of their own: the strong view has that of the weak one."""
        return ["weak", "teacher"] if self.teacher else ["weak"]

    @property
    def blurred(self) -> list[View]:
        """The views that are blurred."""
        if self.augment is None:
            return []
        weak, strong = self.augment.weak.blur, self.augment.strong.blur
        return [view for view in self.views if (strong if view == "strong" else weak)]

    def crop(self, drawn: Mapping[View, Augmentation]) -> np.ndarray:
        """(4,) float32: the part of an encoded image that is decoded, which holds every crop."""
        if not self.teacher:
            return drawn["weak"].crop()
        return union([drawn[view].crop() for view in self.crops])

    def region(self, drawn: Augmentation, crop: np.ndarray) -> np.ndarray:
        """(4,) float32: which part of a frame, as the resize gets it, becomes the square.

        Args:
            drawn: of the view.
            crop: of the image, as ``crop`` gives it.
        """
        # Encoded images are cropped by the decoder, kept ones by the resize.
        if self.kept is not None:
            return drawn.region()
        return drawn.region_in(crop) if self.teacher else drawn.flips()

    def numbers(
        self, drawn: Mapping[View, Augmentation], crop: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The numbers of one sample that an augmenting graph reads beside its images."""
        decoded = (crop,) if self.kept is None else ()
        if not self.resizes:
            return decoded
        regions = [self.region(drawn[view], crop) for view in self.crops]
        blurs = [drawn[view].colours(view)[:, BLUR].copy() for view in self.blurred]
        return (*decoded, *regions, *blurs)

    def frames_of(self, outputs: Sequence[Any]) -> dict[View, Sequence[Any]]:
        """The outputs of a graph that resizes that each view is made of: one per modality."""
        count, made = len(self.modalities), self._outputs()
        return {
            view: outputs[count * place : count * (place + 1)]
            for view in self.views
            for place, own in enumerate(made)
            if view in own
        }

    def _outputs(self) -> list[list[View]]:
        """The views that each group of outputs serves: sharp squares, which views of one crop
        share, then those that are blurred."""
        sharp = [
            [view for view in self.views if view not in self.blurred and self._crop_of(view) == own]
            for own in self.crops
        ]
        return [views for views in sharp if views] + [[view] for view in self.blurred]

    def _crop_of(self, view: View) -> View:
        """The view whose crop a view has."""
        return view if view in self.crops else "weak"

    def build(self, images: Source, numbers: Source, batch_size: int) -> Any:
        """A running pipeline of (H, W, 3) uint8 frames.

        They are squares where the graph resizes, and ``frames_of`` says which are whose; where it
        does not, there is one per modality, each sample of its own size.

        Args:
            images: gives the images of each modality.
            numbers: gives what ``numbers`` returns, transposed; unused where nothing is augmented.
            batch_size: largest number of samples in a batch.
        """
        from nvidia.dali import fn

        pipeline = new_pipeline(self.device, self.data.threads, batch_size, self.data.prefetch)
        with pipeline:
            drawn: list[Any] = []
            if self.augment is not None:
                count = int(self.kept is None)
                count += len(self.crops) + len(self.blurred) if self.resizes else 0
                drawn = list(fn.external_source(source=numbers, num_outputs=count))
            frames = self._images(images)
            if self.kept is None:
                crop = drawn.pop(0) if drawn else None
                frames = [decoded(image, self.device, crop) for image in frames]
            outputs = self._squares(frames, drawn) if self.resizes else frames
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _squares(self, frames: Sequence[Any], drawn: Sequence[Any]) -> list[Any]:
        """The outputs of a graph that resizes, of frames, regions and blurs."""
        regions: Sequence[Any] = drawn[: len(self.crops)] or [None]
        sigmas = dict(zip(self.blurred, drawn[len(self.crops) :], strict=True))
        squares = {
            view: [resized(frame, self.image_size, region) for frame in frames]
            for view, region in zip(self.crops, regions, strict=True)
        }
        outputs: list[Any] = []
        for view, *_ in self._outputs():
            own = squares[self._crop_of(view)]
            if view in sigmas:
                own = [_blur(square, sigmas[view][i]) for i, square in enumerate(own)]
            outputs += own
        return outputs

    def _images(self, source: Source) -> Sequence[Any]:
        """The image of each modality as it comes."""
        from nvidia.dali import fn

        kept_on_gpu = self.kept is not None and self.kept.type == "cuda"
        images = fn.external_source(
            source=source,
            num_outputs=len(self.modalities),
            device="gpu" if kept_on_gpu else "cpu",
            layout=None if self.kept is None else "HWC",
        )
        to_gpu = self.kept is not None and self.device.type == "cuda" and not kept_on_gpu
        return [image.gpu() for image in images] if to_gpu else images


def check_dali() -> None:
    """Say how to install DALI where it is not, or that it cannot be.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        if platform.system() == "Linux":
            what = "cannot be imported, wanted: pip install 'mics-fast[train]'"
        else:
            what = f"exists for Linux alone, and this is {platform.system()}"
        raise InputError(f"NVIDIA DALI, which reads the images, {what}") from None


def new_pipeline(device: torch.device, threads: int | None, batch_size: int, prefetch: int) -> Any:
    """An empty pipeline for a device; without a number of threads, with its share of all."""
    from nvidia.dali import Pipeline

    number = None
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads or share_threads(available_threads(), device)[1],
        device_id=number,
        prefetch_queue_depth=prefetch,
    )


def consumer(device: torch.device) -> torch.cuda.Stream | None:
    """What ``Pipeline.run`` gives its outputs to: torch's stream, which then waits for them in the
    place of the host; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy of an output of equal (H, W, 3) uint8 images, (B, H, W, 3), that owns its memory.

    DALI gives its own to another batch while torch may still have to read it: its streams wait for
    this copy, but not for the readers of what DLPack would share.
    """
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    images = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, images, cuda_stream=consumer(device))
    return images


def decoded(encoded: Any, device: torch.device, crop: Any = None) -> Any:
    """Node of the decoded (H, W, 3) uint8 image, upright; of the crop alone where one is given."""
    from nvidia.dali import fn, math, types

    options: dict[str, Any] = {
        "device": "mixed" if device.type == "cuda" else "cpu",
        "output_type": types.DALIImageType.RGB,
        "jpeg_fancy_upsampling": True,  # of chroma, as on a CPU
    }
    if crop is None:
        return fn.decoders.image(encoded, **options)
    # Of a frame of few pixels a small crop would be none of them.
    height_width = fn.peek_image_shape(encoded, dtype=types.DALIDataType.FLOAT)[:2]
    pixel = 1.0 / fn.stack(height_width[1], height_width[0])
    shape = math.max(crop[2:], pixel)
    return fn.decoders.image_slice(encoded, math.min(crop[:2], 1.0 - shape), shape, **options)


def resized(frame: Any, side: int, region: Any = None) -> Any:
    """Node of a frame's region, resized to a square; a region that runs backwards is flipped."""
    from nvidia.dali import fn, types

    part: dict[str, Any] = {}
    if region is not None:
        part = {"roi_start": region[:2], "roi_end": region[2:], "roi_relative": True}
    return fn.resize(
        frame,
        size=(side, side),
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=True,
        **part,
    )


def _blur(frame: Any, sigma: Any) -> Any:
    from nvidia.dali import fn, math

    return fn.gaussian_blur(frame, sigma=math.max(sigma, _SMALLEST_BLUR))
