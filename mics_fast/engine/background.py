"""Background checkpoints: the state is copied, and a thread writes the copy during training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mics_fast.common.errors import warn
from mics_fast.engine.checkpoint import Checkpoints, CheckpointState

State = TypeVar("State", bound=Mapping[str, Any])


class Snapshot(Generic[State]):
    """A copy of a state in main memory, independent of further training.

    Copies from a GPU are queued behind its current work; the host does not wait.

    Args:
        state: nested dicts, lists and tuples of tensors and plain values.
    """

    def __init__(self, state: State) -> None:
        self._copied: torch.cuda.Event | None = None
        self._state: State = self._copy(state)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> State:
        """Wait until the copy is complete and return it; safe from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._state

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, Mapping):
            return {name: self._copy(own) for name, own in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(own) for own in value)
        return value

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.clone()
        if self._copied is None:
            self._copied = torch.cuda.Event()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class CheckpointWriter:
    """Writes the checkpoints of a stage on one thread, one at a time.

    Args:
        checkpoints: destination.
        name: of the stage.
        meta: entries of ``meta.json``.
    """

    def __init__(self, checkpoints: Checkpoints, name: str, meta: Mapping[str, Any]) -> None:
        self.checkpoints, self.name, self.meta = checkpoints, name, dict(meta)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: CheckpointState, score: float | None = None) -> None:
        """Copy a state, and write it in the background after the previous one.

        Args:
            step: of the state.
            state: of the loop; training may change it afterwards.
            score: the checkpoint is marked as best, once written, if it scores highest.
        """
        self._report(self.wait())
        snapshot = Snapshot(state)
        self._pending = step, self._thread.submit(self._write, step, snapshot, score)

    def wait(self) -> str | None:
        """Wait for the pending checkpoint; return a sentence if it could not be written."""
        if self._pending is None:
            return None
        (step, pending), self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            where = f"the checkpoint of {self.name} step {step}"
            return f"{where} cannot be written: {error.strerror or error}"
        return None

    def close(self) -> None:
        """Wait for pending work, and end the thread."""
        try:
            self._report(self.wait())
        finally:
            self._thread.shutdown()

    def _report(self, failure: str | None) -> None:
        if failure is not None:
            warn(f"{failure}; continuing without it")

    def _write(self, step: int, snapshot: Snapshot[CheckpointState], score: float | None) -> None:
        self.checkpoints.save(step, snapshot.read(), self.meta)
        if score is not None:
            self.checkpoints.offer_best(step, score)
