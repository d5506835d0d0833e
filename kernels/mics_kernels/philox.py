"""Philox4x32-10: random numbers as a function of key and counter, the same on every device.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Unsigned 32-bit
words are held in int64 tensors; every intermediate stays below 2**49, so nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels.backends import native_on_cpu

Word = int | Tensor  # unsigned 32 bits; tensors are int64

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(
    key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute four random 32-bit words for each (key, counter).

    Args:
        key: two words, Python ints or int64 tensors; the low 32 bits are used.
        counter: four words of the same kinds. Key and counter broadcast against each other; all
            tensors are on one device.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Examples:
        >>> import torch
        >>> from mics_kernels.philox import philox4x32
        >>> words = philox4x32((0, 0), (torch.tensor([0]), 0, 0, 0))
        >>> [f"{word.item():08x}" for word in words]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (_word(part) for part in counter)
    k0, k1 = (_word(part) for part in key)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    # After ten rounds every output depends on every input; plain ints become tensors here.
    words = torch.broadcast_tensors(*(torch.as_tensor(part) for part in (c0, c1, c2, c3)))
    return words[0], words[1], words[2], words[3]


def uniforms(words: Tensor) -> Tensor:
    """Convert 32-bit words to uniform numbers in (0, 1): ``((word >> 8) + 0.5) * 2**-24``.

    Args:
        words: int64, any shape, values in [0, 2**32).

    Returns:
        float64, same shape: the values need 25 bits, and float32 would round the upper half.
    """
    return ((words >> 8).to(torch.float64) + 0.5) * 2.0**-24


def row_uniforms(seed: int, row_ids: Tensor, columns: int) -> Tensor:
    """Draw uniform numbers in (0, 1), a function of (seed, row id, column).

    Each is word 0 of the counter (column, row low, row high, 0); the key is the low and the high
    half of the seed. The numbers are the same on every device; on a CPU the C++ part draws them.

    Args:
        seed: 64 bits, signed.
        row_ids: (B,) int64, any value.
        columns: numbers per row, M.

    Returns:
        (B, M) float64.

    Example:
        >>> import torch
        >>> from mics_kernels.philox import row_uniforms
        >>> few = row_uniforms(7, torch.tensor([5]), columns=1)
        >>> many = row_uniforms(7, torch.tensor([4, 5]), columns=3)
        >>> torch.equal(few[0], many[1, :1])  # of row 5
        True
    """
    native = native_on_cpu(row_ids)
    if native is not None:
        return native.row_uniforms(seed, row_ids, columns)
    draws, rows = torch.arange(columns, device=row_ids.device), row_ids.unsqueeze(1)
    return uniforms(philox4x32((seed, seed >> 32), (draws, rows, rows >> 32, 0))[0])


def normals(seed: Tensor, row_ids: Tensor, columns: int) -> Tensor:
    """Draw standard normal numbers, a function of (seed, offset, row id, column).

    The key is the low and the high half of the seed; the counter is (column // 4, row low, row
    high, offset), with the low 32 bits of the offset. The Box-Muller transform turns words (0, 1)
    and (2, 3) into the normals of columns 4 j .. 4 j + 3: cosine, sine, cosine, sine.

    Args:
        seed: (2,) int64, (seed, offset).
        row_ids: (B,) int64, any value.
        columns: numbers per row, D.

    Returns:
        (B, D) float64.

    Examples:
        >>> import torch
        >>> from mics_kernels.philox import normals
        >>> few = normals(torch.tensor([7, 0]), torch.tensor([5]), columns=3)
        >>> many = normals(torch.tensor([7, 0]), torch.tensor([4, 5]), columns=100)
        >>> torch.equal(few[0], many[1, :3])  # of row 5
        True
    """
    draws = torch.arange((columns + 3) // 4, device=row_ids.device)
    rows = row_ids.unsqueeze(1)
    words = philox4x32((seed[0], seed[0] >> 32), (draws, rows, rows >> 32, seed[1]))
    first, second = _box_muller(words[0], words[1]), _box_muller(words[2], words[3])
    return torch.stack((*first, *second), dim=-1).flatten(1)[:, :columns]


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(uniforms(radius_word)))
    angle = 2.0 * torch.pi * uniforms(angle_word)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _word(value: Word) -> Word:
    return value & _MASK


def _multiply(factor: int, word: Word) -> tuple[Word, Word]:
    """Return high and low word of the 64-bit product, by 16-bit halves of ``word``."""
    low = factor * (word & 0xFFFF)
    rest = factor * (word >> 16) + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)
