"""Options of the data: manifest, normalisation, augmentation, cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics_fast.options.fields import option


@dataclass
class ColourConfig:
    """Photometric changes, drawn independently for each modality."""

    brightness: float = option(0.2, "factor in [1 - x, 1 + x]", least=0, most=1)
    contrast: float = option(0.2, "factor in [1 - x, 1 + x], around mid-grey", least=0, most=1)
    saturation: float = option(0.1, "factor in [1 - x, 1 + x]", least=0, most=1)
    hue: float = option(5.0, "rotation in [-x, x] degrees", least=0)
    blur: float = option(
        0.0, "largest standard deviation of a Gaussian blur, pixels; 0 = none", least=0
    )


@dataclass
class AugmentConfig:
    """Augmentation of a training pair; the modalities of a pair share its geometry."""

    crop_scale: tuple[float, float] = option(
        (0.6, 1.0), "smallest and largest area of the crop, as a fraction of the frame",
        above=0, most=1, rising=True,
    )  # fmt: skip
    crop_ratio: tuple[float, float] = option(
        (0.8, 1.25), "smallest and largest aspect ratio of the crop, relative to the frame's",
        above=0, rising=True,
    )  # fmt: skip
    flip: float = option(
        0.5, "probability of a horizontal, and independently of a vertical, flip", least=0, most=1
    )
    weak: ColourConfig = option(factory=ColourConfig)
    strong: ColourConfig = option(
        factory=lambda: ColourConfig(0.4, 0.4, 0.3, hue=10.0, blur=1.5)
    )  # fmt: skip
    rotation: float = option(
        0.0, "of the strong view, in [-x, x] degrees about the centre, shared by the pair",
        least=0, most=180,
    )  # fmt: skip
    shear: float = option(
        0.0, "of the strong view, in [-x, x] degrees, shared by the pair", least=0, most=45
    )
    erasing: float = option(
        0.0, "largest share of the strong view that a box hides, drawn for each modality",
        least=0, most=1,
    )  # fmt: skip


@dataclass
class CacheConfig:
    """Decoded frames kept in memory after their first use.

    Cached frames are uint8 squares; after the first epoch nothing is read or decoded.
    """

    mode: Literal["none", "host", "device"] = option(
        "none",
        '"none" decodes each time; "host" keeps frames in main memory, "device" on the '
        "training device",
    )
    side: int | None = option(
        None, "side of the kept frames, pixels; null: 256/224 of the views' side",
        above=0, most=8192,
    )  # fmt: skip


@dataclass
class DataConfig:
    """The manifest, and the scaling of pixels."""

    manifest: str = option("", "path of the manifest.csv that `mics-fast prepare` wrote")
    modalities: list[str] | None = option(None, "columns of the manifest to use; null: all of them")
    normalize: Literal["fixed", "image"] = option(
        "fixed",
        '"fixed" subtracts data.mean and divides by data.std; "image" uses each image\'s own '
        "channel mean and standard deviation, which removes the lighting",
    )
    mean: dict[str, tuple[float, float, float]] = option(
        help="per modality, three channel means in [0, 1]; default: ImageNet's", factory=dict
    )
    std: dict[str, tuple[float, float, float]] = option(
        help="per modality, three channel standard deviations; default: ImageNet's",
        factory=dict, above=0,
    )  # fmt: skip
    dtype: Literal["fp32", "bf16"] = option(
        "fp32", "of the training views; bf16, half the memory, needs encoders that run in bf16"
    )
    decoder: Literal["auto", "dali", "cpu"] = option(
        "auto",
        'library that decodes images: "dali"; "cpu": Pillow, only on a CPU, equal to one grey '
        'level; "auto": DALI if it is installed, and always on a GPU',
    )
    threads: int | None = option(
        None, "CPU threads of an image pipeline; null: its share of `threads`", above=0, most=1024
    )
    prefetch: int = option(
        2, "batches in flight, prepared while the loop works on another", above=0, most=1024
    )
    on_bad_file: Literal["error", "skip"] = option(
        "error",
        '"error" stops at a file that cannot be read or decoded; "skip" treats it as a missing '
        "modality; a row without any other modality is replaced by the next row",
    )
    cache: CacheConfig = option(factory=CacheConfig)
