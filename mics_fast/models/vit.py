"""The vision transformer (Dosovitskiy et al., ICLR 2021) that encodes one image.

Parameter names and shapes are those of timm's ``VisionTransformer`` without a classifier, so its
weights load by name. The initial weights are MAE's (He et al., CVPR 2022).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mics_fast.common.errors import InputError

Pool = Literal["cls", "mean"]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into non-overlapping square patches, row by row.

    Args:
        images: (B, 3, H, W); H and W are multiples of ``patch_size``.
        patch_size: side of a patch, in pixels.

    Returns:
        (B, N, 3 * patch_size**2); within a patch the order is channel, row, column: the order of
        the weights of ``patch_embed.proj``.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def take_rows(sequences: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each sequence: (B, N, D) and (B, n) int64 -> (B, n, D)."""
    return sequences.gather(1, index.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, the rest as it is: a model in double precision stays there."""
    return values if values.dtype == torch.float64 else values.float()


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine positions of a grid of patches.

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
    """Give every linear layer MAE's initial weights: Xavier-uniform, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            # The convolution counts as what it is, a linear layer on flattened patches.
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def tokens_read(pool: Pool) -> int | None:
    """How many of the first tokens ``pool_tokens`` reads; None: all."""
    return 1 if pool == "cls" else None


def pool_tokens(tokens: Tensor, pool: Pool) -> Tensor:
    """Reduce (B, 1 + N, width) to (B, width): the class token, or the mean of the patch tokens."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Dot-product attention (B, heads, N, d) with its scores materialised.

    For bfloat16 on a CPU: PyTorch's fused kernel there takes its products at the speed of float32,
    a fourth of what the matrix product reaches where the processor multiplies bfloat16.
    """
    with torch.autocast(query.device.type, enabled=False):  # it would copy the scores to float32
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
        """Attend; ``mask`` is bool, broadcastable to (B, heads, N, N), True = may be read.

        Only the first ``wanted`` tokens ask; default all N.
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

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:
        """(B, N, width) -> (B, wanted, width), by default of all N; arguments as ``Attention``."""
        mixed = self.attn(self.norm1(tokens), mask, wanted)
        tokens = tokens[:, :wanted] + mixed
        return tokens + self.mlp(self.norm2(tokens))


class Blocks(nn.ModuleList):
    """Blocks that run one after the other.

    Attributes:
        checkpointing: of each block the backward pass keeps the input alone and computes the rest
            once more: less memory, more arithmetic, the same gradients.
    """

    checkpointing = False

    def forward(self, tokens: Tensor, *mask: Tensor | None, wanted: int | None = None) -> Tensor:
        """(B, N, width) -> (B, wanted, width), by default of all N; a mask goes to every block.

        What becomes of the other tokens in the last block nobody reads: it is left out.
        """
        for number, block in enumerate(self, 1):
            cut = wanted if number == len(self) else None
            if self.checkpointing and torch.is_grad_enabled():
                # No block draws random numbers, so there is no generator to put back.
                tokens = checkpoint(
                    block, tokens, *mask, wanted=cut, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, *mask, wanted=cut)
        return tokens


def checkpoint_activations(model: nn.Module) -> None:
    """Let every stack of blocks compute its activations once more in the backward pass."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.checkpointing = True


class PatchEmbed(nn.Module):
    """Linear embedding of patches; the weight has a convolution's shape, as in timm."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, n, 3 * patch_size**2) -> (B, n, width): the convolution, on chosen patches only."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Encode square RGB images into a class token and patch tokens.

    Args:
        image_size: side of the image, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        width: channels of a token; a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    def __init__(
        self, image_size: int, patch_size: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        # Learned, from sine-cosine [ours]: few images are enough to know where a patch is.
        patch_positions = sincos_positions(grid, grid, width)
        self.pos_embed = nn.Parameter(F.pad(patch_positions, (0, 0, 1, 0)).unsqueeze(0))
        self.blocks = Blocks(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        initialise(self)

    def forward(
        self, images: Tensor, visible: Tensor | None = None, *, wanted: int | None = None
    ) -> Tensor:
        """Encode all patches, or only those that are visible.

        Args:
            images: (B, 3, image_size, image_size), normalised.
            visible: (B, n) int64, indices of the patches to encode, each at most once; default
                all N of them.
            wanted: only the first so many tokens are asked for; 1 is the class token alone.

        Returns:
            (B, 1 + n, width): the class token, then the patches in the order of ``visible``; or
            the first ``wanted`` of these.

        Raises:
            InputError: the images have another size.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise InputError(
                f"images are {tuple(images.shape[1:])}, wanted "
                f"(3, {self.image_size}, {self.image_size})"
            )
        patches = patchify(images, self.patch_size)
        positions = self.pos_embed[:, 1:]
        if visible is not None:
            patches = take_rows(patches, visible)
            positions = take_rows(positions.expand(len(images), -1, -1), visible)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        tokens = self.patch_embed(patches) + positions
        tokens = torch.cat([cls_token.expand(images.shape[0], -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens, wanted=wanted))
