"""A training step recorded as one CUDA graph and then replayed.

A step of a small network is thousands of kernels, each shorter than the time the host takes to
launch it. A graph launches them all at once. What it replays are kernels and addresses: everything
that differs from step to step must lie in a tensor that keeps its place, as ``plan.Stage`` asks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mics_fast.engine.update import Update, Values

WARM_UP = 3
"""Steps on batches of one shape before the recording: compilation for it, optimiser states and
workspaces come into being."""

Recorder = Callable[[Callable[[], Values]], tuple[Callable[[], None], Values]]
"""Records what a function does to the device: gives what does it again, and where its values are,
which hold nothing before it was done once."""


class CapturedUpdate:
    """Steps like the ``Update`` it records, after three batches of one shape by replaying it.

    A batch of another shape, as one with an unreadable image has, is stepped on as it is.

    Args:
        update: of one rank, on a GPU.
        record: how; another one is for tests without a GPU.
    """

    def __init__(self, update: Update, record: Recorder | None = None) -> None:
        self.update = update
        self._record = record or record_cuda_graph
        device = update.plan.device
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shapes: list[torch.Size] = []  # of the latest batches, that many of them
        self._ran = 0
        self._batch: Any = None
        self._replay: Callable[[], None] | None = None
        self._values: Values = {}

    def __call__(self, batch: Any, step: int) -> Values:
        """Train on a batch; what to log, to be read before the next call."""
        given = list(tensors_of(batch))
        shapes = [own.shape for own in given]
        if self._replay is None:
            self._ran = self._ran + 1 if shapes == self._shapes else 1
            self._shapes = shapes
            if self._ran <= WARM_UP:
                with beside(self._aside):
                    return self.update(batch, step)
            self._batch = copy.deepcopy(batch)
            with capturable(self.update):
                self._replay, self._values = self._record(lambda: self.update.compute(self._batch))
        if shapes != self._shapes:
            return self.update(batch, step)
        torch._foreach_copy_(list(tensors_of(self._batch)), given)
        self.update.at.fill_(step)
        self._replay()
        return self._values


def record_cuda_graph(function: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
    """Record on a stream of its own; what other threads do meanwhile (decoding) is left alone."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        values = function()
    return graph.replay, values


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """On a stream beside the current one, which waits for it: what comes into being there is not
    tied to the default stream, on which nothing can be recorded."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def capturable(update: Update) -> Iterator[None]:
    """Optimisers let themselves be recorded only where they are told; fused ones always could."""
    groups = [g for own in update.plan.optimisers.values() for g in own.param_groups]
    for group in groups:
        group["capturable"] = True
    yield
    for group in groups:
        group["capturable"] = False


def tensors_of(batch: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors of a batch's parts, in one order."""
    for part in batch:
        for value in vars(part).values():
            yield from value.values() if isinstance(value, dict) else ()
            if isinstance(value, Tensor):
                yield value
