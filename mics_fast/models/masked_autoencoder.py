"""Masked auto-encoding (He et al., CVPR 2022): masks, targets and the decoder.

The encoder sees the visible patches; the decoder predicts the masked ones, each normalised to
mean 0 and variance 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.common.errors import InputError
from mics_fast.models.vit import (
    Block,
    Blocks,
    at_least_float32,
    initialise,
    patchify,
    sincos_positions,
)
from mics_kernels.philox import philox4x32


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Reassemble square images from their patches: the inverse of ``patchify``.

    Args:
        patches: (B, N, 3 * patch_size**2), N a square number.
        patch_size: side of a patch, in pixels.

    Returns:
        (B, 3, H, H) with H = sqrt(N) * patch_size.
    """
    batch, count, _ = patches.shape
    side = round(count**0.5)
    grid = patches.reshape(batch, side, side, 3, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, side * patch_size, side * patch_size)


def patch_targets(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches and normalise each to mean 0 and variance 1.

    Args:
        images: (B, 3, H, W).
        patch_size: side of a patch, in pixels.

    Returns:
        (B, N, 3 * patch_size**2) float32 (float64 for float64); a constant patch becomes 0.

    Source: MAE, section 4.1, "reconstruction target".
    """
    patches = at_least_float32(patchify(images, patch_size))
    return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)


def random_mask(
    seed: Tensor | tuple[int, int],
    sample_id: Tensor,
    step: int | Tensor,
    num_patches: int,
    mask_ratio: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """Draw the visible patches as a pure function of the arguments.

    Every patch gets 32 random bits, Philox4x32-10 with ``seed`` as key and (patch // 4, sample,
    step, stream) as counter; the patches with the largest values are masked. A sample's mask is
    the same on any rank and device and in any batch.

    Args:
        seed: the two words of the key; (2,) int64 tensor or tuple. Only the low 32 bits of these
            and of the counter's words are used.
        sample_id: (B,) int64, unique in the data.
        step: of training; int or 0-d int64 tensor.
        num_patches: N.
        mask_ratio: share of the patches to mask, in [0, 1).
        stream: index of one of several independent masks: the modality's number.

    Returns:
        visible (B, N - h) and hidden (B, h) int64 patch indices, h = round(N * mask_ratio).

    Raises:
        InputError: ``mask_ratio`` leaves no visible patch, or is negative.
    """
    if not 0 <= mask_ratio < 1 or round(num_patches * mask_ratio) == num_patches:
        raise InputError(
            f"mask_ratio is {mask_ratio:g}, wanted a number of at least 0 that leaves one of "
            f"{num_patches} patches visible"
        )
    count = num_patches - round(num_patches * mask_ratio)
    draw = torch.arange((num_patches + 3) // 4, device=sample_id.device)
    words = philox4x32((seed[0], seed[1]), (draw, sample_id.unsqueeze(1), step, stream))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    # Stable, so that patches with equal bits are ranked by index on every device.
    order = bits.argsort(dim=1, stable=True)
    return order[:, :count], order[:, count:]


class MaskedDecoder(nn.Module):
    """Predicts the masked patches of an image from the encoder's visible tokens.

    Args:
        num_patches: N, a square number.
        patch_dim: numbers in a patch.
        encoder_width: channels of the encoder's tokens.
        width: channels of the decoder; a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    positions: Tensor

    def __init__(
        self,
        num_patches: int,
        patch_dim: int,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        # Fixed and non-zero: without positions, all masked patches would get the same prediction.
        side = round(num_patches**0.5)
        self.register_buffer("positions", sincos_positions(side, side, width))
        self.blocks = Blocks(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, patch_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        initialise(self)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict the masked patches only.

        Attention ignores order, so tokens are not sorted back into place; each carries the position
        of its patch.

        Args:
            tokens: (B, 1 + n, encoder_width), the encoder's class token and visible patches.
            visible: (B, n) int64, the patches of ``tokens[:, 1:]``.
            hidden: (B, h) int64, the patches to predict.

        Returns:
            (B, h, patch_dim), in the order of ``hidden``.
        """
        cls_token, patches = self.embed(tokens).tensor_split([1], dim=1)
        patches = patches + self.positions[visible]
        guesses = self.mask_token + self.positions[hidden]
        sequence = torch.cat([cls_token, patches, guesses], dim=1)
        sequence = self.blocks(sequence)
        return self.head(self.norm(sequence[:, 1 + visible.shape[1] :]))
