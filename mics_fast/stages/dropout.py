"""Modality dropout: hide modalities from the student at random."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_kernels.philox import row_uniforms

# Second word of the key; 0 is used by masks and shifts of seeds below 2**32.
PURPOSE = 1


def drop_modalities(
    present: Tensor, sample_id: Tensor, *, seed: int, step: Tensor, rate: float
) -> Tensor:
    """Drop each present modality with probability ``rate``, but never a row's last one.

    The result is a function of (seed, step, sample) alone: Philox4x32-10 with key (seed, 1) and
    counter (modality, sample, step, 0) gives each modality a uniform number. A modality below
    ``rate`` is dropped unless its number is the largest of the row's present ones.

    Args:
        present: (R, M) bool.
        sample_id: (R,) int64.
        seed: only the low 32 bits are used.
        step: 0-d int64.
        rate: in [0, 1].

    Returns:
        (R, M) bool; a row with any modality keeps at least one.
    """
    rows = (sample_id & 0xFFFFFFFF) | (step << 32)
    draws = row_uniforms((seed & 0xFFFFFFFF) | PURPOSE << 32, rows, present.shape[1])
    draws = torch.where(present, draws, -1.0)
    return present & ((draws >= rate) | (draws == draws.amax(1, keepdim=True)))
