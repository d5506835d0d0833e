"""Model sizes: five built-in ones, or around a published encoder, with which the rest scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mics_fast.common.errors import InputError
from mics_fast.common.tensors import memory_limit
from mics_fast.models.geometry import Geometry, from_numbers
from mics_fast.models.vit import PLAIN, Parts, VisionTransformer
from mics_fast.options import ModelConfig, ModelSize


@dataclass(frozen=True)
class Size:
    """Widths, depths and head counts of one model size.

    Args:
        image: side of the square input, in pixels.
        patch: side of a square patch, in pixels.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the reconstruction decoder.
        discriminator_width, discriminator_depth, discriminator_heads: of the discriminator.
        parts: additions of the encoder to a plain vision transformer.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    discriminator_width: int
    discriminator_depth: int
    discriminator_heads: int
    parts: Parts = PLAIN

    def encoder(self) -> VisionTransformer:
        """Make a new encoder of this size."""
        return VisionTransformer(
            self.image, self.patch, self.width, self.depth, self.heads, self.parts
        )

    @property
    def num_patches(self) -> int:
        """Number of patches of one image."""
        return (self.image // self.patch) ** 2

    @property
    def patch_dim(self) -> int:
        """Values of one patch: three channels of patch x patch pixels."""
        return 3 * self.patch**2


SIZES: dict[ModelSize, Size] = {
    "vit_nano": Size(64, 8, 64, 3, 4, 48, 1, 4, 64, 2, 4),
    "vit_micro": Size(64, 8, 128, 4, 4, 64, 2, 4, 128, 2, 4),
    "vit_tiny": Size(224, 16, 192, 12, 3, 128, 4, 4, 192, 4, 3),
    "vit_small": Size(224, 16, 384, 12, 6, 256, 4, 8, 384, 4, 6),
    "vit_base": Size(384, 16, 768, 12, 12, 512, 8, 16, 768, 6, 6),
}


def size_of(model: ModelConfig) -> Size:
    """Return the networks of a run: of ``model.geometry`` if given, else of ``model.size``.

    Raises:
        InputError: ``model.image`` is no multiple of the patch, or ``model.geometry`` is of no
            network, or of one that is too large for this machine.
    """
    size = around(from_numbers(model.geometry)) if model.geometry else SIZES[model.size]
    image = model.image or size.image
    if image % size.patch:
        raise InputError(
            f"option model.image is {image}, wanted a multiple of {size.patch}, the side of the "
            "encoder's patches"
        )
    size = replace(size, image=image)
    needed = 4 * _parameters(size)
    if needed > memory_limit() // 4:  # as many encoders as modalities, and what trains them
        raise InputError(
            f"an encoder of width {size.width}, depth {size.depth} and {image} px in patches of "
            f"{size.patch} takes {needed / 2**30:.1f} GiB, wanted at most "
            f"{memory_limit() / 2**32:.1f} on this machine"
        )
    return size


def _parameters(size: Size) -> int:
    """Count the parameters of an encoder, without those that grow with the width alone."""
    hidden = size.parts.hidden or 4 * size.width
    tokens = (size.image // size.patch) ** 2 + 3 * size.patch**2
    return size.width * (size.depth * (4 * size.width + 2 * hidden) + tokens)


def around(geometry: Geometry) -> Size:
    """Combine an encoder with decoder and discriminator of the widest size that is not wider."""
    narrower = [size for size in SIZES.values() if size.width <= geometry.width]
    like = max(narrower or [SIZES["vit_nano"]], key=lambda size: size.width)
    parts = geometry.parts
    if parts.hidden == 4 * geometry.width:
        parts = replace(parts, hidden=0)
    return replace(
        like,
        image=geometry.image,
        patch=geometry.patch,
        width=geometry.width,
        depth=geometry.depth,
        heads=geometry.heads,
        parts=parts,
    )


def canonical(model: ModelConfig) -> ModelConfig:
    """Name the networks by a built-in size if they are of one, without its default image side.

    Runs are compared in this form, so that the origin of their weights makes no difference.
    """
    size = size_of(model)
    names = (name for name, own in SIZES.items() if replace(size, image=own.image) == own)
    name = next(names, None)
    if name is None:
        return model
    image = None if size.image == SIZES[name].image else size.image
    return replace(model, size=name, image=image, geometry={})


def network_name(model: ModelConfig) -> str:
    """Return what to call the encoders of a run in a sentence."""
    if not model.geometry:
        return model.size
    size = size_of(model)
    return f"ViT {size.width} x {size.depth}, patch {size.patch}, {size.image} px"
