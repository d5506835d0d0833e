"""CUDA graphs: a training step is recorded once and then replayed.

A step of a small network is thousands of kernels, each shorter than the time the host takes to
launch it. A graph launches them all at once. It replays kernels with fixed addresses: everything
that changes from step to step must lie in a tensor that is updated in place (see ``plan.Stage``).
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
"""Steps on batches of one shape before the recording, for compilation, optimiser states and
workspaces."""

Recorder = Callable[[Callable[[], Values]], tuple[Callable[[], None], Values]]
"""Records the device work of a function. Returns a function that replays it, and the tensors of its
values, which are undefined before the first replay."""


class CapturedUpdate:
    """Trains like the ``Update`` it records; after three batches of one shape it replays a graph.

    Batches of other shapes, for example with an unreadable image, are trained on without a graph.

    Args:
        update: of a single rank, on a GPU.
        record: the recorder; tests without a GPU replace it.
    """

    def __init__(self, update: Update, record: Recorder | None = None) -> None:
        self.update = update
        self._record = record or record_cuda_graph
        device = update.plan.device
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shapes: list[torch.Size] = []  # of as many batches as precede a recording
        self._ran = 0
        self._batch: Any = None
        self._replay: Callable[[], None] | None = None
        self._values: Values = {}

    def __call__(self, batch: Any, step: int) -> Values:
        """Train on a batch; return the values to log, valid until the next call."""
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
        self.update.begin(step)
        self._replay()
        return self._values


def record_cuda_graph(function: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
    """Record on a separate stream; other threads may use the GPU meanwhile (decoding)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        values = function()
    return graph.replay, values


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on a side stream that the current one waits for: work on the default stream cannot be
    recorded, nor can tensors be tied to it."""
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
    """Make the optimisers capturable; fused ones always are, others need the flag."""
    groups = [g for own in update.plan.optimisers.values() for g in own.param_groups]
    for group in groups:
        group["capturable"] = True
    yield
    for group in groups:
        group["capturable"] = False


def tensors_of(batch: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors of a batch's parts in a fixed order."""
    for part in batch:
        for value in vars(part).values():
            yield from value.values() if isinstance(value, dict) else ()
            if isinstance(value, Tensor):
                yield value
