"""The DALI graph: encoded images and augmentation numbers in, decoded frames or squares out.

Only the crop of each image is decoded. On a GPU (``mixed`` decode) the graph then resizes the crop
to a square (triangle filter, antialiased), flips it, and blurs it for each view that is blurred.
On a CPU, where DALI's resize takes as long as its decoder, ``resize.py`` does the same per frame,
and cached frames need no graph. Images stay uint8, so every operation rounds. An evaluation view
is the whole frame resized to the square: the geometry of training with the largest crop and no
flip. Colour and normalisation follow in ``views.py``.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.data.augmentation import BLUR, Augmentation, View, union
from mics_fast.data.pillow_decoding import PillowPipeline, Source
from mics_fast.data.views import IMAGENET_STD
from mics_fast.engine.threads import available_threads, share_threads
from mics_fast.options import AugmentConfig, DataConfig

WHOLE = np.array([0, 0, 1, 1], np.float32)
"""The whole frame as a crop (left, top, width, height as fractions of it) and as a region (top,
left, bottom, right)."""

# DALI refuses a standard deviation of 0; this one changes no pixel.
_SMALLEST_BLUR = 1e-3

Decoder = Literal["dali", "cpu"]


@dataclass(frozen=True)
class PairGraph:
    """The steps from a pair of images to its views, the same for all samples.

    Args:
        modalities: names, in the order of the source's images.
        data: normalisation, threads and batches in flight.
        image_size: side of the views, pixels.
        device: where images are decoded and views are stored.
        augment: augmentation options; None: the evaluation view.
        strong: also make the strong view.
        kept: device of the cached (H, W, 3) uint8 frames; None: images are encoded.
        teacher: also make the teacher's view, with its own crop.

    Raises:
        InputError: DALI is wanted and not installed, or a standard deviation is not positive.
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
        decoder_of(self.data, self.device)
        for name in self.modalities:
            std = self.data.std.get(name, IMAGENET_STD)
            if min(std) <= 0:
                raise InputError(f"option data.std of {name} is {std}, wanted numbers above 0")

    @property
    def resizes(self) -> bool:
        """True if the graph outputs squares, already blurred where needed."""
        return self.device.type == "cuda"

    @property
    def runs(self) -> bool:
        """True if there is any work for a graph."""
        return self.kept is None or self.resizes

    @property
    def views(self) -> list[View]:
        """Views of each image, the weak (or evaluation) view first."""
        wanted: list[tuple[View, bool]] = [("strong", self.strong), ("teacher", self.teacher)]
        return ["weak", *(view for view, made in wanted if made)]

    @property
    def crops(self) -> list[View]:
        """Views with their own crop; the strong view shares the crop of the weak one."""
        return ["weak", "teacher"] if self.teacher else ["weak"]

    @property
    def blurred(self) -> list[View]:
        """Views that are blurred."""
        if self.augment is None:
            return []
        weak, strong = self.augment.weak.blur, self.augment.strong.blur
        return [view for view in self.views if (strong if view == "strong" else weak)]

    def crop(self, drawn: Mapping[View, Augmentation]) -> np.ndarray:
        """Return the part of an encoded image to decode, (4,) float32; it contains every crop."""
        if not self.teacher:
            return drawn["weak"].crop()
        return union([drawn[view].crop() for view in self.crops])

    def region(self, drawn: Augmentation, crop: np.ndarray) -> np.ndarray:
        """Return the region of the resize's input that becomes the square, (4,) float32.

        Args:
            drawn: augmentation of the view.
            crop: of the image, from ``crop``.
        """
        # The decoder crops encoded images, the resize crops cached ones.
        if self.kept is not None:
            return drawn.region()
        return drawn.region_in(crop) if self.teacher else drawn.flips()

    def numbers(
        self, drawn: Mapping[View, Augmentation], crop: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Return the numbers of one sample that an augmenting graph reads beside its images."""
        decoded = (crop,) if self.kept is None else ()
        if not self.resizes:
            return decoded
        regions = [self.region(drawn[view], crop) for view in self.crops]
        blurs = [drawn[view].colours(view)[:, BLUR].copy() for view in self.blurred]
        return (*decoded, *regions, *blurs)

    def frames_of(self, outputs: Sequence[Any]) -> dict[View, Sequence[Any]]:
        """Map each view to its outputs of a resizing graph, one per modality."""
        count, made = len(self.modalities), self._outputs()
        return {
            view: outputs[count * place : count * (place + 1)]
            for view in self.views
            for place, own in enumerate(made)
            if view in own
        }

    def _outputs(self) -> list[list[View]]:
        """List the views served by each group of outputs: first sharp squares, which views of one
        crop share, then blurred ones."""
        sharp = [
            [view for view in self.views if view not in self.blurred and self._crop_of(view) == own]
            for own in self.crops
        ]
        return [views for views in sharp if views] + [[view] for view in self.blurred]

    def _crop_of(self, view: View) -> View:
        """Return the view whose crop a view uses."""
        return view if view in self.crops else "weak"

    def build(self, images: Source, numbers: Source, batch_size: int) -> Any:
        """Build a running pipeline, of DALI or Pillow, of (H, W, 3) uint8 frames.

        If the graph resizes, the outputs are squares, and ``frames_of`` assigns them to views;
        otherwise there is one output per modality, and samples differ in size.

        Args:
            images: source of the images of each modality.
            numbers: source of the transposed results of ``numbers``; unused without augmentation.
            batch_size: largest number of samples in a batch.
        """
        if decoder_of(self.data, self.device) == "cpu":
            crops = None if self.augment is None else numbers
            return PillowPipeline(images, crops, self.data.threads, self.data.prefetch)
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
        """Build the outputs of a resizing graph from frames, regions and blurs."""
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
        """Build the input nodes, one per modality."""
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


def decoder_of(data: DataConfig, device: torch.device) -> Decoder:
    """Choose the library that decodes images for a device.

    Raises:
        InputError: DALI is wanted and cannot be imported, or Pillow is wanted on a GPU.
    """
    if data.decoder == "cpu":
        if device.type != "cpu":
            raise InputError("option data.decoder is cpu, wanted auto or dali on a GPU")
        return "cpu"
    if data.decoder == "auto" and device.type == "cpu" and not has_dali():
        return "cpu"
    check_dali()
    return "dali"


def has_dali() -> bool:
    """Return True if DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def check_dali() -> None:
    """Check that DALI can be imported, and say how to install it if not.

    Raises:
        InputError: DALI cannot be imported.
    """
    if not has_dali():
        if platform.system() == "Linux":
            what = "cannot be imported, wanted: pip install 'mics-fast[dali]'"
        else:
            what = f"exists for Linux alone, and this is {platform.system()}"
        raise InputError(f"NVIDIA DALI, which reads the images, {what}")


def new_pipeline(device: torch.device, threads: int | None, batch_size: int, prefetch: int) -> Any:
    """Make an empty pipeline for a device; by default it gets its share of all threads."""
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
    """Return the stream that waits for the outputs of ``Pipeline.run`` instead of the host:
    torch's current one; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def to_torch(output: Any, device: torch.device) -> Tensor:
    """Copy an output of equal (H, W, 3) uint8 images to a tensor (B, H, W, 3) that owns its memory.

    DALI reuses an output's memory for another batch while torch may still read it: its streams wait
    for this copy, but would not wait for readers of memory shared by DLPack.
    """
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    images = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
    feed_ndarray(dense, images, cuda_stream=consumer(device))
    return images


def decoded(encoded: Any, device: torch.device, crop: Any = None) -> Any:
    """Build the node of the upright, decoded (H, W, 3) uint8 image, or of a crop of it."""
    from nvidia.dali import fn, math, types

    options: dict[str, Any] = {
        "device": "mixed" if device.type == "cuda" else "cpu",
        "output_type": types.DALIImageType.RGB,
        "jpeg_fancy_upsampling": True,  # chroma is upsampled as on a CPU
    }
    if crop is None:
        return fn.decoders.image(encoded, **options)
    # A small crop of a tiny frame would be empty.
    height_width = fn.peek_image_shape(encoded, dtype=types.DALIDataType.FLOAT)[:2]
    pixel = 1.0 / fn.stack(height_width[1], height_width[0])
    shape = math.max(crop[2:], pixel)
    return fn.decoders.image_slice(encoded, math.min(crop[:2], 1.0 - shape), shape, **options)


def resized(frame: Any, side: int, region: Any = None) -> Any:
    """Build the node that resizes a region to a square; a region with swapped ends is flipped."""
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
