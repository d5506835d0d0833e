"""Gradient averaging over ranks, overlapped with the backward pass.

``DistributedDataParallel`` does not fit: it expects every parameter's gradient from one forward and
one backward pass of one module. Here the temperature and the fusion head are used outside the
module's forward, disabled terms leave parameters without a gradient, and the discriminator runs
with and without gradients of its own. Hooks on the parameters avoid these limits, rename nothing in
a checkpoint, and let modules be compiled one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mics_fast.engine.distributed import world_size

BUCKET_BYTES = 25 * 2**20  # as in DDP


class GradientAverager:
    """Replaces gradients by their mean over all ranks.

    Buckets are sent in the same order on every rank, each as soon as all its gradients, and those
    of earlier buckets, are ready. They are formed in the first step from the parameters with a
    gradient, in reverse order of the model, which is roughly the order of the backward pass.

    Args:
        parameters: in the order of the forward pass.
        bucket_bytes: size at which a bucket is full.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._unsorted = list(parameters)[::-1]
        self._bucket_bytes = bucket_bytes
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[Tensor, Bucket] = {}
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

    def _arrived(self, parameter: Tensor) -> None:
        if not self._active or parameter not in self._bucket_of:
            return
        self._bucket_of[parameter].missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._buckets[self._sent].send()
            self._sent += 1

    def _form_buckets(self) -> None:
        """Form buckets of the parameters that have received their first gradient."""
        size = self._bucket_bytes
        fresh = [parameter for parameter in self._unsorted if parameter.grad is not None]
        self._unsorted = [parameter for parameter in self._unsorted if parameter.grad is None]
        for parameter in fresh:
            if size >= self._bucket_bytes:
                self._buckets.append(Bucket())
                size = 0
            self._buckets[-1].parameters.append(parameter)
            self._bucket_of[parameter] = self._buckets[-1]
            size += parameter.numel() * parameter.element_size()


class Bucket:
    """Parameters whose gradients travel in one message.

    Attributes:
        missing: number of gradients not yet computed in this backward pass.
    """

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.missing = 0
        self._gradients: list[Tensor] = []
        self._message = torch.empty(0)
        self._work: dist.Work | None = None

    def send(self) -> None:
        """Start to sum the available gradients; they are the same set on all ranks."""
        self._gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._gradients:
            self._message = torch.cat([gradient.flatten() for gradient in self._gradients])
            self._work = dist.all_reduce(self._message, async_op=True)

    def receive(self) -> None:
        """Replace the gradients by their means."""
        if self._work is None:
            return
        self._work.wait()
        self._message /= world_size()
        parts = self._message.split([gradient.numel() for gradient in self._gradients])
        means = [part.view_as(g) for part, g in zip(parts, self._gradients, strict=True)]
        torch._foreach_copy_(self._gradients, means)
        self._gradients, self._message, self._work = [], torch.empty(0), None
