"""Low-rank adaptation of a frozen encoder (Hu et al., LoRA, ICLR 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mics_fast.models.vit import Attention, VisionTransformer


class LoraLinear(nn.Linear):
    """A frozen linear layer plus ``alpha / rank`` times a learned product of two thin matrices.

    Args:
        layer: whose weight and bias stay.
        rank: columns and rows of the two matrices.
        alpha: scale of their product; it starts at zero.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank
        self.lora_down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, values: Tensor) -> Tensor:
        low = F.linear(values, self.lora_down)
        return super().forward(values) + self.scale * F.linear(low, self.lora_up)


def add_lora(encoder: VisionTransformer, *, rank: int, alpha: float) -> None:
    """Freeze an encoder but for additions to query, key, value and projection of each block."""
    encoder.requires_grad_(False)
    attentions = [module for module in encoder.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.qkv = LoraLinear(attention.qkv, rank, alpha)
        attention.proj = LoraLinear(attention.proj, rank, alpha)
