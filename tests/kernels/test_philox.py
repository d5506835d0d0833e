"""Philox4x32-10, its uniforms and its normals."""

import math

import numpy as np
import pytest
import torch

from mics_kernels.philox import normals, philox4x32, uniforms

# Random123, tests/kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, output):
    assert tuple(int(word) for word in philox4x32(key, counter)) == output


def test_tensors_and_ints_broadcast_to_the_known_answers():
    counters = [
        torch.tensor(words) for words in zip(*(c for c, _, _ in KNOWN_ANSWERS), strict=True)
    ]
    keys = [torch.tensor(words) for words in zip(*(k for _, k, _ in KNOWN_ANSWERS), strict=True)]
    words = torch.stack(philox4x32(tuple(keys), tuple(c.unsqueeze(1) for c in counters)), dim=-1)
    assert words.shape == (3, 3, 4) and words.dtype == torch.int64
    assert words.diagonal(dim1=0, dim2=1).T.tolist() == [list(out) for _, _, out in KNOWN_ANSWERS]


def test_negative_and_wide_numbers_count_by_their_low_32_bits():
    narrow = philox4x32((7, 0xFFFFFFFF), (0xFFFFFFFE, 5, 0, 1))
    wide = philox4x32(
        (torch.tensor(7 + (3 << 32)), torch.tensor(-1)), (torch.tensor(-2), 5, 1 << 32, 1)
    )
    assert torch.equal(torch.stack(narrow), torch.stack(wide))


def test_uniforms_never_reach_zero_or_one():
    ends = uniforms(torch.tensor([0, 255, 256, 0xFFFFFFFF]))
    assert ends.tolist() == [2.0**-25, 2.0**-25, 3 * 2.0**-25, 1 - 2.0**-25]


def scalar_normal(seed, offset, row, column):
    """One normal by the words of the design, in Python numbers."""
    low, high = row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = [int(w) for w in philox4x32(key, (column // 4, low, high, offset & 0xFFFFFFFF))]
    pair = words[0:2] if column % 4 < 2 else words[2:4]
    u, v = (((word >> 8) + 0.5) * 2.0**-24 for word in pair)
    turn = math.cos if column % 2 == 0 else math.sin
    return math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * v)


@pytest.mark.parametrize("seed", [(3, 4), (-1, 0), (2**40 + 17, 2**33 + 2)])
def test_normals_follow_the_layout_word_by_word(seed):
    rows = torch.tensor([0, 5, 2**35 + 1, -7])
    made = normals(torch.tensor(seed), rows, columns=7)
    wanted = [[scalar_normal(*seed, row, column) for column in range(7)] for row in rows.tolist()]
    np.testing.assert_allclose(made.numpy(), np.array(wanted), rtol=0, atol=1e-14)


def test_normals_do_not_depend_on_the_rows_and_columns_beside_them():
    seed = torch.tensor([11, 2])
    rows = torch.arange(9)
    whole = normals(seed, rows, columns=10)
    assert torch.equal(normals(seed, rows[[4, 1]], columns=6), whole[[4, 1], :6])


def test_normals_change_with_seed_offset_and_row():
    rows = torch.arange(4)
    made = [normals(torch.tensor(s), rows, 8) for s in ([1, 0], [2, 0], [1, 1], [1 + 2**32, 0])]
    for i, one in enumerate(made):
        for other in made[:i]:
            assert (one - other).abs().min() > 0


def test_normals_have_the_moments_of_the_normal_law():
    draws = normals(torch.tensor([5, 6]), torch.arange(50_000), 8)
    count = len(draws)
    assert draws.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (torch.cov(draws.T) - torch.eye(8)).abs().max() < 5 * math.sqrt(2 / count)
    assert abs(draws.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / draws.numel())
    assert abs(draws.pow(3).mean().item()) < 5 * math.sqrt(15 / draws.numel())


def test_no_normals_for_no_rows():
    assert normals(torch.tensor([0, 0]), torch.arange(0), 5).shape == (0, 5)
