"""The five model sizes: decoder and discriminator scale with the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from mics_fast.models.vit import PLAIN, Parts, VisionTransformer


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


SIZES = {
    "vit_nano": Size(64, 8, 64, 3, 4, 48, 1, 4, 64, 2, 4),
    "vit_micro": Size(64, 8, 128, 4, 4, 64, 2, 4, 128, 2, 4),
    "vit_tiny": Size(224, 16, 192, 12, 3, 128, 4, 4, 192, 4, 3),
    "vit_small": Size(224, 16, 384, 12, 6, 256, 4, 8, 384, 4, 6),
    "vit_base": Size(384, 16, 768, 12, 12, 512, 8, 16, 768, 6, 6),
}
