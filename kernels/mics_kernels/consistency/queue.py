"""The queue of older keys: a ring of features, its ids, and how far it is filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mics_kernels import checks

NO_ID = torch.iinfo(torch.int64).max  # of rows without an id: readable, and nobody's repeat


class FeatureQueue(nn.Module):
    """The latest features of one modality, first in, first out.

    Rows are written in place, around the end, without a look at the device's data. State is in
    buffers, so it is saved, restored and moved with the module. With several ranks, enqueue what
    all of them have, gathered in the order of ranks: their queues stay identical.

    Args:
        size: rows it holds, Q >= 1.
        dim: feature width D >= 1.
        dtype: of the stored features.

    Attributes:
        features: (Q, D); rows from ``length`` on were never written.
        ids: (Q,) int64; -1 (never read) where nothing was written, the largest int64 (nobody's
            repeat) where a feature came without an id.
        length: 0-d int64, rows filled so far; pass it as ``queue_length``.
        position: 0-d int64, the row to be written next.

    Raises:
        ValueError: size or dim below 1.

    Source: He et al., Momentum Contrast, CVPR 2020, section 3.2.
    """

    features: Tensor
    ids: Tensor
    length: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        checks.check_whole("size", size, 1)
        checks.check_whole("dim", dim, 1)
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("length", torch.zeros((), dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self, features: Tensor, ids: Tensor | None = None, present: Tensor | None = None
    ) -> None:
        """Append rows; of more than Q rows the last Q stay.

        Args:
            features: (B, D), any float dtype and any B.
            ids: (B,) int64, the sample (or group) of each row.
            present: (B,) bool; a row marked False is skipped.

        Raises:
            TypeError: wrong type or dtype.
            ValueError: wrong shape or device.
        """
        size, dim = self.features.shape
        device = self.features.device
        checks.check_tensor("features", features, ("B", dim), checks.FLOATS, device)
        rows = len(features)
        if ids is None:
            ids = torch.full((rows,), NO_ID, device=device)
        checks.check_tensor("ids", ids, (rows,), checks.LABELS, device)
        if present is None:
            present = torch.ones(rows, dtype=torch.bool, device=device)
        checks.check_tensor("present", present, (rows,), checks.FLAGS, device)

        # Absent rows first, the others in order behind them; the absent ones that are left land
        # before the write position and put back what is there, so no count is read on the host.
        added = present.sum()
        written = min(rows, size)
        order = present.to(torch.uint8).argsort(stable=True)[rows - written :]
        start = self.position + added - written
        slots = (start + torch.arange(written, device=device)) % size
        kept = present[order]
        new = features[order].to(self.features.dtype)
        self.features[slots] = torch.where(kept.unsqueeze(1), new, self.features[slots])
        self.ids[slots] = torch.where(kept, ids[order], self.ids[slots])
        self.position.copy_((self.position + added) % size)
        self.length.copy_((self.length + added).clamp(max=size))
