"""Low-rank adaptation."""

from __future__ import annotations

import copy

import torch

from mics_fast.models.lora import add_lora


def test_an_adapted_encoder_starts_as_the_original(tiny):
    encoder = tiny.encoder()
    adapted = copy.deepcopy(encoder)
    add_lora(adapted, rank=2, alpha=4.0)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(adapted(images), encoder(images))


def test_only_the_additions_to_attention_learn(tiny):
    encoder = tiny.encoder()
    add_lora(encoder, rank=2, alpha=4.0)
    learned = {name for name, own in encoder.named_parameters() if own.requires_grad}
    wanted = {
        f"blocks.{k}.attn.{layer}.lora_{part}"
        for k in range(tiny.depth)
        for layer in ("qkv", "proj")
        for part in ("down", "up")
    }
    assert learned == wanted  # fmt: skip


def test_the_addition_is_alpha_over_rank_times_the_product(tiny):
    encoder = tiny.encoder()
    add_lora(encoder, rank=2, alpha=6.0)
    layer = encoder.blocks[0].attn.qkv
    torch.nn.init.normal_(layer.lora_up)
    whole = layer.weight + 3.0 * layer.lora_up @ layer.lora_down
    values = torch.randn(5, tiny.width)
    wanted = torch.nn.functional.linear(values, whole, layer.bias)
    torch.testing.assert_close(layer(values), wanted)
