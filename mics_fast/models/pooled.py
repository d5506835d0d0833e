"""Frozen encoders: one standardised feature per image, and the fusion of such features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.models.vit import Pool, VisionTransformer, initialise, pool_tokens, tokens_read
from mics_fast.options import PooledFusionName

NARROWER = 4
"""Features are so many times wider than the joint part of their fusion inside."""


class PooledEncoder(nn.Module):
    """The standardised, pooled feature of a frozen encoder, in the place of a class token.

    Features that were computed before are read as they are; ``attach`` makes it read images.

    Args:
        width: channels of a feature.
        pool: what is kept of the tokens: the class token, or the mean of the patch tokens.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.encoder: VisionTransformer | None = None
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def attach(self, encoder: VisionTransformer) -> None:
        """Read images through an encoder from now on."""
        self.encoder = encoder.requires_grad_(False)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Give each channel of (R, width) features mean 0 and variance 1; R may be 0."""
        if len(features):
            variance, mean = torch.var_mean(features, dim=0, correction=0)
            self.mean.copy_(mean)
            self.scale.copy_((variance + 1e-6).rsqrt())

    def forward(self, images: Tensor, *, wanted: int | None = None) -> Tensor:
        """Map (B, 3, H, W) images, or (B, width) features without an encoder, to (B, 1, width)."""
        features = images
        if self.encoder is not None:
            features = pooled(self.encoder, images, self.pool)
        return ((features - self.mean) * self.scale).unsqueeze(1)


def pooled(encoder: VisionTransformer, images: Tensor, pool: Pool) -> Tensor:
    """Compute the feature of each image, (B, 3, H, W) -> (B, width) float32."""
    return pool_tokens(encoder(images, wanted=tokens_read(pool)), pool).float()


class PooledFusion(nn.Module):
    """Fuse one feature per modality [ours]: their mean, and what they say together.

    The joint part is an MLP of all features, or their bilinear product of low rank (Kim et al.,
    Hadamard product for low-rank bilinear pooling, ICLR 2017). It starts at zero: from few labels
    the fusion head first learns what a linear head learns on the mean.

    Args:
        modalities: number M of modalities.
        width: channels of a feature.
        kind: of the joint part, "mlp" or "bilinear".
    """

    def __init__(self, modalities: int, width: int, kind: PooledFusionName) -> None:
        super().__init__()
        self.kind = kind
        hidden = width // NARROWER
        if kind == "mlp":
            self.joint = nn.ModuleList([nn.Linear(modalities * width, hidden)])
        else:
            self.joint = nn.ModuleList(nn.Linear(width, hidden) for _ in range(modalities))
        self.out = nn.Linear(hidden, width)
        initialise(self)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """Fuse the present modalities; features of absent ones are never read.

        Args:
            features: (B, M, 1, width), finite everywhere.
            present: (B, M) bool.

        Returns:
            (B, width).
        """
        there = present.unsqueeze(-1)
        own = torch.where(there, features.squeeze(2), 0.0)
        mean = own.sum(1) / there.sum(1).clamp(min=1)
        if self.kind == "mlp":
            together = F.gelu(self.joint[0](own.flatten(1)))
        else:
            factors = [torch.tanh(layer(own[:, k])) for k, layer in enumerate(self.joint)]
            together = torch.stack(factors, 1).masked_fill(~there, 1.0).prod(1)
        return mean + self.out(together)
