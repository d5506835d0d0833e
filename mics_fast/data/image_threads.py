"""A pool of threads that each process one image at a time in torch."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch


def image_workers(threads: int | None) -> ThreadPoolExecutor:
    """Make a pool of threads whose torch operators are single-threaded.

    It has as many threads as torch, which are idle while a batch is made, or as the image pipeline
    if that is more. With OpenMP threads of its own, each worker would spin-wait and take cores from
    the others and from DALI. Threads outside the pool keep their number of OpenMP threads.
    """
    return ThreadPoolExecutor(max(threads or 1, torch.get_num_threads()), "image", _work_alone)


def _work_alone() -> None:
    # The first call in a thread resets its number of OpenMP threads, so it must come first.
    torch.get_num_threads()
    # torch.set_num_threads acts on the whole process; OpenMP's own function on this thread only.
    set_own = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_own is not None:  # torch was built with OpenMP
        set_own(1)
