"""Threads that work on one image each, in torch."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch


def image_workers(threads: int | None) -> ThreadPoolExecutor:
    """A pool of threads whose torch operators use no further threads.

    As many as torch has, whose own rest while a batch is made, or as the image pipeline has.
    Each would otherwise call on OpenMP threads of its own, which wait for work by spinning and so
    take the cores from each other and from DALI. Other threads keep their number.
    """
    return ThreadPoolExecutor(max(threads or 1, torch.get_num_threads()), "image", _work_alone)


def _work_alone() -> None:
    torch.get_num_threads()  # sets the number of a new thread, which must not happen later
    # torch.set_num_threads would set it for the whole process; OpenMP's own is for this thread.
    set_own = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_own is not None:  # torch was built with OpenMP
        set_own(1)
