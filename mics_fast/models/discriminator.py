"""The discriminator of the adversarial alignment: real or reconstructed patch sequence?

It is a transformer with a bounded Lipschitz constant: L2 attention with tied queries and keys
(Kim et al., ICML 2021) and linear layers of constant spectral norm (ViTGAN, Lee et al., ICLR 2022).
Samples of a batch are independent, so a logit has a gradient only in its own sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.models.vit import Blocks, take_rows


def l2_attention(points: Tensor, values: Tensor, queries: int | None = None) -> Tensor:
    """Average values with weights softmax_j(-|q_i - q_j|**2 / sqrt(d)).

    Since |q_i|**2 cancels in the softmax, these are the weights of dot-product attention of
    [2 q_i, -1] with [q_j, |q_j|**2], so the fused kernels apply. Squared distances have a finite
    gradient everywhere.

    Args:
        points: (B, heads, N, d) float32 or float64, used as queries and keys.
        values: (B, heads, N, d).
        queries: number of leading points used as queries; default: all N.

    Returns:
        (B, heads, queries, d).

    Source: Kim, Papamakarios, Mnih, The Lipschitz Constant of Self-Attention, section 3.2.
    """
    width = points.shape[-1]
    # The fused float32 kernels need equal widths, a multiple of 4, for queries, keys and values.
    padding = -(width + 1) % 4
    squares = points.square().sum(dim=-1, keepdim=True)
    minus_one = -torch.ones_like(squares[:, :, :queries])
    query = F.pad(torch.cat([2 * points[:, :, :queries], minus_one], dim=-1), (0, padding))
    key = F.pad(torch.cat([points, squares], dim=-1), (0, padding))
    value = F.pad(values, (0, 1 + padding))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)
    return mixed[..., :width]


class SpectralLinear(nn.Module):
    """Linear layer whose weight is rescaled to keep its initial spectral norm.

    The effective weight is ``weight * initial_norm / sigma`` with ``sigma = u^T weight v``. The
    gradient passes through ``sigma`` but not through its singular vectors ``u`` and ``v``, which
    only ``advance_power_iteration`` updates: a forward pass changes no state.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        gain: of the Xavier-uniform initial weight; it fixes the spectral norm.

    Source: Miyato et al., ICLR 2018; the rescaling by the initial norm: ViTGAN, equation 8.
    """

    u: Tensor
    v: Tensor
    initial_norm: Tensor

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain=gain)
        left, _, right = torch.linalg.svd(self.weight.detach(), full_matrices=False)
        self.register_buffer("u", left[:, 0].clone())
        self.register_buffer("v", right[0].clone())
        self.register_buffer("initial_norm", self.spectral_norm().detach())

    @torch.no_grad()
    def advance_power_iteration(self) -> None:
        """Update ``u`` and ``v`` in place by one power iteration."""
        self.v.copy_(F.normalize(self.weight.T @ self.u, dim=0))
        self.u.copy_(F.normalize(self.weight @ self.v, dim=0))

    def spectral_norm(self) -> Tensor:
        """Estimate the largest singular value by u^T W v, 0-d; differentiable in W."""
        return torch.dot(self.u, self.weight @ self.v)

    def effective_weight(self) -> Tensor:
        """Rescale the weight, (outputs, inputs), to its initial spectral norm."""
        return self.weight * (self.initial_norm / self.spectral_norm())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.effective_weight(), self.bias)


class L2Block(nn.Module):
    """Pre-norm transformer block with L2 attention and spectrally normalised layers.

    Args:
        width: channels of a token; a multiple of ``heads``.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        # The squared distance of two normalised tokens is 2 d; with this gain their logit is -2 for
        # any d. At gain 1 it is -2 sqrt(d): each token attends only to itself, and hardly any
        # gradient flows from the class token to the patches.
        self.points = SpectralLinear(width, width, gain=(width / heads) ** -0.25)
        self.values = SpectralLinear(width, width)
        self.proj = SpectralLinear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = SpectralLinear(width, 4 * width)
        self.fc2 = SpectralLinear(4 * width, width)

    def forward(self, tokens: Tensor, *, wanted: int | None = None) -> Tensor:
        """Map (B, N, width) to (B, wanted, width); default: all N."""
        features = self.norm1(tokens)
        points = self.points(features).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        values = self.values(features).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = l2_attention(points, values, wanted).transpose(1, 2).flatten(2)
        tokens = tokens[:, :wanted] + self.proj(mixed)
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


class Discriminator(nn.Module):
    """Discriminator of normalised patch sequences: one logit per sample, large for real ones.

    Args:
        num_patches: N.
        patch_dim: numbers in a patch.
        width: channels of a token; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    def __init__(
        self, num_patches: int, patch_dim: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = SpectralLinear(patch_dim, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        self.blocks = Blocks(L2Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = SpectralLinear(width, 1)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def advance_power_iteration(self) -> None:
        """Run one power iteration in every layer; called once per step, before the forward pass."""
        for layer in self.modules():
            if isinstance(layer, SpectralLinear):
                layer.advance_power_iteration()

    def forward(self, patches: Tensor, places: Tensor | None = None) -> Tensor:
        """Judge sequences of patches, in the dtype of the weights (float32) even under autocast.

        Args:
            patches: (B, n, patch_dim), in the space of ``patch_targets``.
            places: (B, n) int64, positions of the patches in the image; default: all N, in order.

        Returns:
            (B,) logits, float32 (float64 after ``.double()``): large = real.
        """
        with torch.autocast(patches.device.type, enabled=False):
            tokens = self.embed(patches.to(self.cls_token.dtype))
            cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
            positions = self.pos_embed[:, 1:]
            if places is not None:
                positions = take_rows(positions.expand(len(tokens), -1, -1), places)
            tokens = torch.cat([cls_token, tokens + positions], dim=1)
            tokens = self.blocks(tokens, wanted=1)
            return self.head(self.norm(tokens[:, 0])).squeeze(-1)
