"""The encoder: timm's names, the textbook block, and masking by omitting patches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mics_fast.common.errors import InputError
from mics_fast.models.sizes import SIZES
from mics_fast.models.vit import (
    Block,
    PatchEmbed,
    VisionTransformer,
    attend_written_out,
    patchify,
    pool_tokens,
    sincos_positions,
    take_rows,
)


def tiny_encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch_size=4, width=16, depth=2, heads=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_that_nobody_reads_are_left_out_of_the_last_block(checkpointing):
    """In float64, wanted tokens and gradients are the same as without skipping the others."""
    results = []
    for wanted in (None, 1):
        encoder = tiny_encoder().double()
        encoder.blocks.checkpointing = checkpointing
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
        tokens = encoder(images, wanted=wanted)
        assert tokens.shape[1] == (wanted or 17)
        tokens[:, 0].square().sum().backward()
        results.append([tokens[:, 0], *(p.grad for p in encoder.parameters())])
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def encoder_of(name: str) -> VisionTransformer:
    size = SIZES[name]
    with torch.device("meta"):
        return VisionTransformer(size.image, size.patch, size.width, size.depth, size.heads)


def test_parameters_of_vit_base_have_timms_names_and_shapes():
    width = 768
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    expected = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 577, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    } | {f"blocks.{n}.{name}": shape for n in range(12) for name, shape in block.items()}
    state = encoder_of("vit_base").state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_nano", 166_656),
        ("vit_micro", 826_496),
        ("vit_tiny", 5_524_416),
        ("vit_small", 21_665_664),
        ("vit_base", 86_090_496),  # timm's vit_base_patch16_384 without its classifier
    ],
)
def test_sizes_have_the_published_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in encoder_of(name).parameters()) == parameters


def test_patches_run_row_by_row_and_hold_channel_row_column():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(patches[1, 4], images[1, :, 4:8, 4:8].flatten(), rtol=0, atol=0)


def test_patch_embedding_is_the_convolution_of_its_weight():
    torch.manual_seed(0)
    embed = PatchEmbed(patch_size=4, width=16).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(images, 4)), expected)


def test_block_is_the_textbook_pre_norm_block():
    torch.manual_seed(0)
    block = Block(width=16, heads=4).double()
    textbook = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation=F.gelu, norm_first=True, batch_first=True,
        layer_norm_eps=1e-6, dtype=torch.float64,
    )  # fmt: skip
    pairs = {
        textbook.self_attn.in_proj_weight: block.attn.qkv.weight,
        textbook.self_attn.in_proj_bias: block.attn.qkv.bias,
        textbook.self_attn.out_proj.weight: block.attn.proj.weight,
        textbook.self_attn.out_proj.bias: block.attn.proj.bias,
        textbook.linear1.weight: block.mlp.fc1.weight,
        textbook.linear1.bias: block.mlp.fc1.bias,
        textbook.linear2.weight: block.mlp.fc2.weight,
        textbook.linear2.bias: block.mlp.fc2.bias,
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            ours.normal_(std=0.3)
            theirs.copy_(ours)
    tokens = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), textbook(tokens))


def test_positions_follow_the_sine_cosine_formula_on_a_rectangular_grid():
    positions = sincos_positions(3, 5, 8)
    row, column, w = torch.tensor(2.0), torch.tensor(4.0), torch.tensor([1.0, 0.01])
    expected = torch.cat([f(p * w) for p in (row, column) for f in (torch.sin, torch.cos)])
    assert positions.shape == (15, 8)
    torch.testing.assert_close(positions[2 * 5 + 4], expected)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.01


def test_seeing_every_patch_is_the_same_as_no_mask():
    encoder = tiny_encoder()
    nn.init.normal_(encoder.pos_embed)  # the class token's own position too
    images = torch.randn(3, 3, 16, 16)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_hidden_patches_are_never_read():
    encoder = tiny_encoder()
    images, visible = torch.randn(1, 3, 16, 16), torch.tensor([[0, 5, 10]])
    kept = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    for patch in (0, 5, 10):
        top, left = patch // 4 * 4, patch % 4 * 4
        kept[..., top : top + 4, left : left + 4] = True
    poisoned = images.masked_fill(~kept, float("nan"))
    torch.testing.assert_close(encoder(poisoned, visible), encoder(images, visible), rtol=0, atol=0)


def test_tokens_come_in_the_order_of_the_visible_patches():
    encoder = tiny_encoder()
    images, visible = torch.randn(1, 3, 16, 16), torch.tensor([[9, 2, 14]])
    tokens, swapped = encoder(images, visible), encoder(images, visible.flip(1))
    torch.testing.assert_close(swapped[:, 1:].flip(1), tokens[:, 1:])
    torch.testing.assert_close(swapped[:, 0], tokens[:, 0])


def test_every_parameter_learns():
    encoder = tiny_encoder()
    encoder(torch.randn(2, 3, 16, 16)).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_pool_is_the_class_token_or_the_mean_of_the_patches():
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(pool_tokens(tokens, "cls"), tokens[:, 0])
    torch.testing.assert_close(pool_tokens(tokens, "mean"), tokens[:, 1:].sum(1) / 4)


def test_take_rows_picks_each_samples_own_rows():
    sequences = torch.arange(12.0).reshape(2, 3, 2)
    taken = take_rows(sequences, torch.tensor([[2, 0], [1, 1]]))
    assert taken.tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_images_of_another_size_are_told_in_one_sentence():
    with pytest.raises(InputError, match=r"^images are \(3, 20, 16\), wanted \(3, 16, 16\)"):
        tiny_encoder()(torch.zeros(1, 3, 20, 16))


def test_initial_weights_depend_on_the_global_seed_alone():
    first, second = tiny_encoder().state_dict(), tiny_encoder().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_autocast_stays_near_float32():
    encoder = tiny_encoder()
    images, visible = torch.randn(4, 3, 16, 16), torch.tensor([[1, 6, 11, 12]]).expand(4, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encoder(images, visible)
    error = (low.float() - encoder(images, visible)).abs().max()
    assert error < 0.1  # measured: 0.03 on tokens of unit variance


def test_compiles_into_one_graph():
    encoder = tiny_encoder()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    images, visible = torch.randn(2, 3, 16, 16), torch.tensor([[3, 1], [0, 15]])
    torch.testing.assert_close(compiled(images, visible), encoder(images, visible))


def test_attention_in_bfloat16_on_a_cpu_is_attention():
    """It is written out there; float32 attention of the same rounded numbers is the truth."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 8).bfloat16()
    mask = torch.rand(2, 1, 1, 20) < 0.7
    for readable in (None, mask):
        wanted = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=readable
        )
        got = attend_written_out(query, key, value, readable)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=1e-2)


def test_a_block_under_autocast_is_the_block_but_for_rounding():
    torch.manual_seed(0)
    block, tokens = Block(width=16, heads=2), torch.randn(2, 5, 16)
    wanted = block(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = block(tokens)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2)
    assert not torch.equal(got, wanted)
