"""The vision transformer (Dosovitskiy et al., ICLR 2021) that encodes one image.

Parameter names and shapes are those of timm's ``VisionTransformer`` without a classifier, so its
weights load by name. The initial weights are MAE's (He et al., CVPR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mics_fast.common.errors import InputError

Pool = Literal["cls", "mean"]


@dataclass(frozen=True)
class Parts:
    """Additions of published vision transformers to the plain one.

    Args:
        hidden: width of the MLP; 0: four times the token's.
        registers: register tokens behind the class token (Darcet et al., ICLR 2024).
        prefix_positions: class and register tokens have positions of their own.
        layer_scale: each branch is scaled per channel (DINOv2).
        pre_norm: a norm before the first block (CLIP).
        patch_bias: the patch embedding has a bias (not in CLIP).
        quick_gelu: ``x * sigmoid(1.702 x)`` instead of GELU (OpenAI's CLIP).
        eps: of all norms.
        antialias: positions are resampled with antialiasing (not in DINOv2 without registers).
    """

    hidden: int = 0
    registers: int = 0
    prefix_positions: bool = True
    layer_scale: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    quick_gelu: bool = False
    eps: float = 1e-6
    antialias: bool = True


PLAIN = Parts()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into non-overlapping square patches, row by row.

    Args:
        images: (B, 3, H, W); H and W are multiples of ``patch_size``.
        patch_size: side of a patch, in pixels.

    Returns:
        (B, N, 3 * patch_size**2); within a patch the order is channel, row, column, as in the
        weights of ``patch_embed.proj``.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def take_rows(sequences: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each sequence: (B, N, D) and (B, n) int64 -> (B, n, D)."""
    return sequences.gather(1, index.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64."""
    return values if values.dtype == torch.float64 else values.float()


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Compute two-dimensional sine-cosine positions for a grid of patches.

    The first half of the channels encodes the row, the second the column, each as
    ``[sin(p * w_i), cos(p * w_i)]`` with ``w_i = 10000 ** (-i / (width / 4))``.

    Args:
        rows, columns: size of the grid.
        width: number of channels, a multiple of 4.

    Returns:
        (rows * columns, width) float32, in the order of ``patchify``.

    Source: Vaswani et al. 2017, section 3.5, on two axes as in MAE.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.unsqueeze(-1) * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    return torch.cat([encode(row), encode(column)], dim=-1).flatten(0, 1).float()


def initialise(module: nn.Module) -> None:
    """Initialise every linear layer as MAE does: Xavier-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            # The convolution counts as a linear layer on flattened patches.
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def tokens_read(pool: Pool) -> int | None:
    """Return the number of leading tokens that ``pool_tokens`` reads; None: all."""
    return 1 if pool == "cls" else None


def pool_tokens(tokens: Tensor, pool: Pool) -> Tensor:
    """Reduce (B, 1 + N, width) to (B, width): the class token, or the mean of the patch tokens."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


def quick_gelu(values: Tensor) -> Tensor:
    """Approximate GELU as in OpenAI's CLIP."""
    return values * torch.sigmoid(1.702 * values)


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute dot-product attention, (B, heads, N, d), with materialised scores.

    For bfloat16 on a CPU: PyTorch's fused kernel multiplies at the speed of float32 there, a
    quarter of the speed of matrix products on processors with bfloat16 instructions.
    """
    with torch.autocast(query.device.type, enabled=False):  # it would convert scores to float32
        scores = query @ (key * key.shape[-1] ** -0.5).transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ value


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, wanted: int | None = None
    ) -> Tensor:
        """Attend; ``mask`` is bool, broadcastable to (B, heads, N, N), True = readable.

        Only the first ``wanted`` tokens are queries; default: all N.
        """
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, :wanted]
        if query.device.type == "cpu" and query.dtype == torch.bfloat16:
            mixed = attend_written_out(query, key, value, mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, parts: Parts = PLAIN) -> None:
        super().__init__()
        hidden = parts.hidden or 4 * width
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = quick_gelu if parts.quick_gelu else F.gelu

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(tokens)))


class LayerScale(nn.Module):
    """A factor per channel (Touvron et al., ICCV 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, parts: Parts = PLAIN) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=parts.eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if parts.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=parts.eps)
        self.mlp = Mlp(width, parts)
        self.ls2 = LayerScale(width) if parts.layer_scale else nn.Identity()

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:
        """Map (B, N, width) to (B, wanted, width); default: all N. Arguments as ``Attention``."""
        mixed = self.attn(self.norm1(tokens), mask, wanted)
        tokens = tokens[:, :wanted] + self.ls1(mixed)
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class Blocks(nn.ModuleList):
    """A sequence of transformer blocks.

    Attributes:
        checkpointing: store only each block's input for the backward pass and recompute the rest:
            less memory, more arithmetic, the same gradients.
    """

    checkpointing = False

    def forward(self, tokens: Tensor, *mask: Tensor | None, wanted: int | None = None) -> Tensor:
        """Map (B, N, width) to (B, wanted, width); default: all N. The mask goes to every block.

        Unwanted tokens skip the last block.
        """
        for number, block in enumerate(self, 1):
            cut = wanted if number == len(self) else None
            if self.checkpointing and torch.is_grad_enabled():
                # Blocks draw no random numbers, so no generator needs restoring.
                tokens = checkpoint(
                    block, tokens, *mask, wanted=cut, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, *mask, wanted=cut)
        return tokens


def checkpoint_activations(model: nn.Module) -> None:
    """Make every stack of blocks recompute its activations in the backward pass."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.checkpointing = True


class PatchEmbed(nn.Module):
    """Linear embedding of patches; the weight has the shape of a convolution's, as in timm."""

    def __init__(self, patch_size: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (B, n, 3 * patch_size**2) to (B, n, width): a convolution on selected patches."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Encodes square RGB images into a class token and patch tokens.

    Args:
        image_size: side of the image, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        width: channels of a token; a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads of a block.
        parts: additions of a published family to the plain transformer.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        parts: Parts = PLAIN,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.parts = parts
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, width, bias=parts.patch_bias)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if parts.registers:
            self.reg_token = nn.Parameter(torch.empty(1, parts.registers, width))
            nn.init.normal_(self.reg_token, std=0.02)
        # Learned, from sine-cosine initial values [ours], so that few images are enough.
        patch_positions = sincos_positions(grid, grid, width)
        prefix = 1 + parts.registers if parts.prefix_positions else 0
        self.pos_embed = nn.Parameter(F.pad(patch_positions, (0, 0, prefix, 0)).unsqueeze(0))
        self.norm_pre = nn.LayerNorm(width, eps=parts.eps) if parts.pre_norm else nn.Identity()
        self.blocks = Blocks(Block(width, heads, parts) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=parts.eps)
        nn.init.normal_(self.cls_token, std=0.02)
        initialise(self)

    def forward(
        self, images: Tensor, visible: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:
        """Encode all patches, or only the visible ones.

        Args:
            images: (B, 3, image_size, image_size), normalised.
            visible: (B, n) int64, indices of the patches to encode, each at most once; default:
                all N.
            wanted: number of leading tokens to return; 1 is the class token only.

        Returns:
            (B, 1 + n, width): the class token, then the patches in the order of ``visible``; or
            the first ``wanted`` of these. Register tokens are not returned.

        Raises:
            InputError: the images have the wrong size.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise InputError(
                f"images are {tuple(images.shape[1:])}, wanted "
                f"(3, {self.image_size}, {self.image_size})"
            )
        tokens = self.norm_pre(self._embed(images, visible))
        tokens = self.norm(self.blocks(tokens, wanted=wanted))
        registers = self.parts.registers
        if not registers or wanted == 1:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)

    def _embed(self, images: Tensor, visible: Tensor | None) -> Tensor:
        """Concatenate class, register and patch tokens, each with its position."""
        patches = patchify(images, self.patch_size)
        prefix: Tensor = self._prefix()
        positions: Tensor = self.pos_embed
        if self.parts.prefix_positions:
            prefix = prefix + positions[:, : prefix.shape[1]]
            positions = positions[:, prefix.shape[1] :]
        if visible is not None:
            patches = take_rows(patches, visible)
            positions = take_rows(positions.expand(len(images), -1, -1), visible)
        tokens = self.patch_embed(patches) + positions
        return torch.cat([prefix.expand(images.shape[0], -1, -1), tokens], dim=1)

    def _prefix(self) -> Tensor:
        if not self.parts.registers:
            return self.cls_token
        return torch.cat([self.cls_token, self.reg_token], dim=1)
