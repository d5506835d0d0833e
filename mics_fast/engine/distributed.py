"""Distributed training (``torchrun``): ranks, collectives, and a common end of all processes.

Each process works on its slice of every batch. Without a process group there is one rank, and
every function here reduces to the single-process case. Small values travel as CPU tensors over
gloo, so that they never wait for a GPU.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mics_fast.common.errors import InputError, RunFailed
from mics_fast.common.lifetime import end_with_parent

T = TypeVar("T")
CPU = torch.device("cpu")
SECONDS_TO_START = 600  # between the start of the first process and of the last one


def is_launched() -> bool:
    """Return True if ``torchrun`` (or another launcher with its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def processes_here() -> int:
    """Return the number of processes that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device, minutes: float = 30.0) -> Iterator[None]:
    """Join the processes that ``torchrun`` started into one group.

    If one fails, it alone reports the reason; the others leave without a message.

    Args:
        device: of this process; NCCL is used on a GPU, gloo on a CPU.
        minutes: how long to wait for another process, for example while rank 0 writes the last
            checkpoint.

    Raises:
        RunFailed: another process ended without a message, or did not answer in time.
    """
    if not is_launched():
        yield
        return
    end_with_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, processes = next(dist.rendezvous("env://"))
    store = store_of_this_start(store, number, processes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=number, world_size=processes, timeout=timedelta(minutes=minutes)
    )
    try:
        yield
    except Exception as error:
        first = _fails_first(store, number)
        if first:  # for torchrun's report, and the file of ``--log-dir``
            with suppress(OSError):
                get_error_handler().record_exception(error)
        if device.type == "cpu":  # NCCL would wait for the missing ranks
            dist.destroy_process_group()
        if not first:
            raise SystemExit(2 if isinstance(error, InputError) else 1) from None
        if "timed out" in str(error).lower():
            raise RunFailed(
                f"process {number} waited {minutes:g} minutes for another one of this run that did "
                "not answer; raise timeout_minutes if it had work to do"
            ) from None
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise RunFailed(f"process {number} lost another one of this run, which ended") from None
        raise
    dist.destroy_process_group()


def store_of_this_start(store: dist.Store, number: int, processes: int) -> dist.Store:
    """Return the part of torchrun's store for this start of all processes.

    torchrun keeps one store for all restarts, including the addresses of dead processes. It counts
    starts per machine, so after a fault the counts may differ. Rank 0 therefore names the start,
    and answers each rank under a name that this rank has just drawn: answers to ranks of an earlier
    start are never read.

    Args:
        store: shared by all starts.
        number: rank of this process.
        processes: number of processes in this start.

    Raises:
        RunFailed: the processes did not find each other in time.
    """
    while isinstance(store, dist.PrefixStore):  # torch's own, with the count of this machine
        store = store.underlying_store
    own, end = secrets.token_hex(8), time.monotonic() + SECONDS_TO_START

    def waited_for(key: str) -> bool:
        if time.monotonic() > end:
            raise RunFailed(f"process {number} waited {SECONDS_TO_START} s for the others to start")
        return store.check([key])

    if number == 0:
        missing = set(range(1, processes))
        while missing:
            for other in sorted(missing):
                if waited_for(f"hello-{other}"):
                    store.set(f"start-for-{store.get(f'hello-{other}').decode()}", own)
                if store.check([f"joined-{own}-{other}"]):
                    missing.discard(other)
            time.sleep(0.01)
        return dist.PrefixStore(f"start-{own}", store)
    store.set(f"hello-{number}", own)
    while not waited_for(f"start-for-{own}"):
        time.sleep(0.01)
    start = store.get(f"start-for-{own}").decode()
    store.set(f"joined-{start}-{number}", "")
    return dist.PrefixStore(f"start-{start}", store)


def _fails_first(store: dist.Store, number: int) -> bool:
    """Return True if no other rank has failed before, or if that can no longer be known."""
    try:
        return store.compare_set("failed", "", str(number)).decode() == str(number)
    except RuntimeError:
        return True


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows (R, ...) of every rank to (ranks * R, ...), in rank order, without gradient.

    All ranks must have the same number of rows.
    """
    if world_size() == 1:
        return rows.detach()
    own = rows.detach().contiguous()
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered)


def own_first(gathered: Tensor) -> Tensor:
    """Rotate the result of ``gather_rows`` so that this rank's own rows come first."""
    return gathered.roll(-rank() * (len(gathered) // world_size()), 0) if rank() else gathered


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the ranks of a group, by default all of them, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total, group=group)
    return total


def from_first(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and return its result on all ranks.

    Raises:
        InputError: raised by the action, re-raised on all ranks.
    """
    if world_size() == 1:
        return action()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said[0] = action()
        except InputError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0, device=CPU)
    if said[1] is not None:
        raise InputError(said[1])
    return said[0]


def from_each(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank; return all results, in rank order, on all ranks.

    Raises:
        InputError: raised by the action on any rank, re-raised on all ranks.
    """
    if world_size() == 1:
        return [action()]
    own: tuple[Any, str | None] = (None, None)
    try:
        own = (action(), None)
    except InputError as error:
        own = (None, str(error))
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    for _, failure in found:
        if failure is not None:
            raise InputError(failure)
    return [result for result, _ in found]


def share_of(rows: Sequence[T]) -> Sequence[T]:
    """Return this rank's rows: contiguous, in rank order, and at most one more than another's."""
    start, end = (len(rows) * number // world_size() for number in (rank(), rank() + 1))
    return rows[start:end]


def refuse_differences(own: Mapping[str, Any]) -> None:
    """Refuse to train if a rank was started with values that differ from rank 0's.

    Args:
        own: name -> value that must be equal on all ranks.

    Raises:
        InputError: raised on all ranks; names the rank, its value and that of rank 0.
    """
    first = from_first(lambda: dict(own))
    names = [*own, *(name for name in first if name not in own)]
    changed = [name for name in names if first.get(name) != own.get(name)]
    failure = None
    if changed:
        name = changed[0]
        failure = InputError(
            f"process {rank()} was started with {name} {own.get(name)!r}, but process 0 with "
            f"{first.get(name)!r}; all processes of a run need the same options and manifest"
        )
    agree(failure=failure)


@torch.no_grad()
def start_alike(tensors: Mapping[str, Tensor]) -> None:
    """Give all ranks the tensors of rank 0, in place.

    Args:
        tensors: parameters and buffers by name, the same ones on every rank.

    Raises:
        InputError: a rank has another set of tensors, shapes or dtypes than rank 0.
    """
    if world_size() == 1:
        return
    refuse_differences({name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()})
    for tensor in filter(Tensor.numel, tensors.values()):
        message = tensor.detach().contiguous().flatten()
        dist.broadcast(message.view(torch.uint8), src=0)
        tensor.copy_(message.view(tensor.shape))


class Agreement:
    """Yes/no answers that are combined over all ranks by "or", while the ranks do other work.

    Making one starts a message and does not wait for the other ranks. Ranks make and read all of
    theirs in the same order.

    Args:
        asked: this rank's answers.
        failure: the error that stops this rank, if any.
    """

    def __init__(self, *asked: bool, failure: Exception | None = None) -> None:
        self._asked, self._failure = asked, failure
        self._work: dist.Work | None = None
        if world_size() > 1:
            self._flags = torch.tensor([rank() + 1 if failure else 0, *map(int, asked)])
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True)

    def read(self) -> list[bool]:
        """Wait for all ranks, and return the common answers.

        Raises:
            Exception: the failure of any rank, raised on all ranks.
        """
        asked, failure = self._asked, self._failure
        if self._work is not None:
            self._work.wait()
            failed, *answers = self._flags.tolist()
            asked = tuple(map(bool, answers))
            if failed:
                said = [failure]
                dist.broadcast_object_list(said, src=failed - 1, device=CPU)
                failure = said[0]
        if failure is not None:
            raise failure
        return list(asked)


def agree(*asked: bool, failure: Exception | None = None) -> list[bool]:
    """Combine yes/no answers over all ranks by "or", and wait for them; see ``Agreement``."""
    return Agreement(*asked, failure=failure).read()


def least_over_ranks(number: int) -> int:
    """Return the minimum of a number over the ranks."""
    if world_size() == 1:
        return number
    least = torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def mean_over_ranks(values: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Average scalars over the ranks in float64; plain numbers are equal on all ranks."""
    means = dict(values)
    tensors = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
    if world_size() > 1 and tensors:
        stacked = sum_over_ranks(torch.stack(list(tensors.values()))) / world_size()
        means |= zip(tensors, stacked, strict=True)
    return means


def local_gpu() -> torch.device:
    """Return this process's GPU; each process that ``torchrun`` starts here has its own.

    Raises:
        InputError: there are more processes than GPUs.
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise InputError(
            f"process {number} of this machine has no GPU of its own, torch sees "
            f"{torch.cuda.device_count()}; start one process per GPU (--nproc-per-node)"
        )
    return torch.device("cuda", number) if is_launched() else torch.device("cuda")
