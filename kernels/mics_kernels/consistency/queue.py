"""Queue of older keys: a ring buffer of features and their ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mics_kernels import checks

NO_ID = torch.iinfo(torch.int64).max  # id of rows without one: readable, equal to no other


class FeatureQueue(nn.Module):
    """First-in, first-out queue of the latest features of one modality.

    Rows are written in place, around the end, without a host synchronisation. The state is in
    buffers: it is saved, restored and moved with the module. With several ranks, enqueue the
    features of all of them, gathered in the order of ranks, and the queues stay identical.

    Args:
        size: number of rows, Q >= 1.
        dim: feature width, D >= 1.
        dtype: dtype of the stored features.

    Attributes:
        features: (Q, D); rows from ``length`` on are unwritten.
        ids: (Q,) int64; -1 (never read) in unwritten rows, the largest int64 (equal to no other id)
            for features enqueued without ids.
        length: 0-d int64, number of rows filled; pass it as ``queue_length``.
        position: 0-d int64, next row to write.

    Raises:
        ValueError: size or dim below 1.

    Source: He et al., Momentum Contrast, CVPR 2020, section 3.2.

    Examples:
        >>> import torch
        >>> from mics_kernels import FeatureQueue, consistency_loss
        >>> queue = FeatureQueue(size=8, dim=4)
        >>> queue.enqueue(torch.eye(4))
        >>> queue.length.item()
        4
        >>> loss = consistency_loss(
        ...     torch.eye(4), torch.eye(4), torch.eye(4), queue.features,
        ...     temperature=0.5, queue_length=queue.length,
        ... )
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
        """Append rows; of more than Q rows, keep the last Q.

        Args:
            features: (B, D), any float dtype and any B.
            ids: (B,) int64, the sample (or group) of each row.
            present: (B,) bool; rows marked False are skipped.

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

        # Sort absent rows to the front. Those among the last Q land before the write position and
        # rewrite what is there, so that no count is read on the host.
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
