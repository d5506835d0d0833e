"""Gradient averaging over ranks, overlapped with the backward pass.

The design is that of ``DistributedDataParallel`` (DDP): hooks on the parameters, buckets whose
views are the gradients, a small first bucket. DDP itself would serve most runs, also with
parameters that are used outside a module's forward pass. Three kinds of run rule it out. Terms that
are switched off leave parameters without a gradient, which DDP takes for an error or searches the
graph for. With ``compile_scope step`` the forward passes are compiled methods of the stage, which
DDP does not wrap. A static graph, which would avoid the search, excludes accumulation over parts of
a batch. The hooks here serve all three, and rename nothing in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from mics_fast.engine.distributed import world_size

BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # as in DDP


class GradientAverager:
    """Replaces gradients by their mean over all ranks.

    Buckets are sent in the same order on every rank, each as soon as all its gradients, and those
    of earlier buckets, are ready. They are formed in the first step from the parameters with a
    gradient, in reverse order of the model, which is roughly the order of the backward pass. The
    first bucket is small, so that sending begins early. From then on gradients are views of the
    buckets: valid until the next backward pass.

    Args:
        parameters: in the order of the forward pass.
        bucket_bytes: size at which a bucket is full.
        message: dtype of what is sent; None: that of the gradients. In bfloat16 the ranks add up
            rounded gradients, in half the bytes.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        bucket_bytes: int = BUCKET_BYTES,
        message: torch.dtype | None = None,
    ) -> None:
        self._unsorted = list(parameters)[::-1]
        self._bucket_bytes, self._message = bucket_bytes, message
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._sent = 0
        self._active = False
        if world_size() > 1:
            for parameter in self._unsorted:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Wrap the last backward pass before the step; afterwards gradients are averaged."""
        if world_size() == 1:
            yield
            return
        self._sent = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._active = True
        try:
            yield
        finally:
            self._active = False
        self._form_buckets()
        for bucket in self._buckets[self._sent :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()

    def _arrived(self, parameter: nn.Parameter) -> None:
        bucket = self._bucket_of.get(parameter) if self._active else None
        if bucket is None:
            return
        bucket.take(parameter)
        bucket.missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._buckets[self._sent].send()
            self._sent += 1

    def _form_buckets(self) -> None:
        """Form buckets of the parameters that have received their first gradient."""
        fresh = [parameter for parameter in self._unsorted if parameter.grad is not None]
        self._unsorted = [parameter for parameter in self._unsorted if parameter.grad is None]
        first = self._bucket_bytes if self._buckets else FIRST_BUCKET_BYTES
        for parameters in in_buckets(fresh, min(first, self._bucket_bytes), self._bucket_bytes):
            bucket = Bucket(parameters, self._message)
            self._buckets.append(bucket)
            self._bucket_of |= dict.fromkeys(parameters, bucket)


def in_buckets(
    parameters: Sequence[nn.Parameter], first: int, others: int
) -> list[list[nn.Parameter]]:
    """Split parameters, in order, into buckets of one dtype and device.

    Args:
        parameters: in the order of the backward pass.
        first: bytes at which the first bucket is full.
        others: bytes at which any other bucket is full.
    """
    buckets: list[list[nn.Parameter]] = []
    size = full = first
    for parameter in parameters:
        before = buckets[-1][-1] if buckets else parameter
        alike = (before.dtype, before.device) == (parameter.dtype, parameter.device)
        if size >= full or not alike:
            full = others if buckets else first
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


class Bucket:
    """Parameters whose gradients lie side by side in memory and travel in one message.

    Args:
        parameters: of one dtype and device.
        message: dtype of the message; None: that of the parameters.

    Attributes:
        missing: number of gradients not yet computed in this backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], message: torch.dtype | None) -> None:
        self.parameters, self.missing = parameters, 0
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self._gradients = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = self._gradients.split(sizes)
        self._views = {p: part.view(p.shape) for p, part in zip(parameters, parts, strict=True)}
        self._dtype = message or first.dtype
        self._message = self._gradients
        self._work: dist.Work | None = None

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Move a gradient into the bucket."""
        view = self._views[parameter]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view

    @torch.no_grad()
    def send(self) -> None:
        """Start to sum the gradients; the same parameters have one on all ranks."""
        for parameter in self.parameters:
            self.take(parameter)
            if parameter.grad is None:
                self._views[parameter].zero_()
        self._message = self._gradients.to(self._dtype)
        self._work = dist.all_reduce(self._message, async_op=True)

    @torch.no_grad()
    def receive(self) -> None:
        """Replace the gradients by their means."""
        assert self._work is not None, "nothing was sent"
        self._work.wait()
        if self._message is not self._gradients:
            self._gradients.copy_(self._message)
        self._gradients /= world_size()
        self._message, self._work = self._gradients, None
