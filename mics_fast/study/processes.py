"""Tasks in processes of their own, a few at a time, that end with the process that began them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue

import torch

from mics_fast.common.errors import InputError
from mics_fast.engine.loop import StopOnSignal

STOPPED = 3  # exit status of a task that SIGTERM asked to stop


@dataclass(frozen=True)
class Task:
    """Something to do that leaves its result on disk.

    Args:
        name: for a person.
        work: can be pickled; True when it is done, False where SIGTERM asked it to stop.
    """

    name: str
    work: Callable[[], bool]


def run_tasks(tasks: Sequence[Task], processes: int) -> bool:
    """Do all tasks, in their order as far as they begin.

    Args:
        tasks: independent of each other.
        processes: 1: in this process, one after the other; otherwise so many at a time, each in a
            new process with its share of torch's threads and without output.

    Returns:
        True when all are done, False where SIGTERM asked to stop.

    Raises:
        InputError: the sentence of the first task that failed; the others are stopped.
    """
    if processes == 1:
        for task in tasks:
            print(task.name, flush=True)
            if not task.work():
                return False
        return True
    waiting, running = list(tasks), list[tuple[Task, SpawnProcess]]()
    context = get_context("spawn")
    sentences: SimpleQueue[str] = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // processes)
    with StopOnSignal() as stop:
        try:
            while running or (waiting and not stop.asked):
                while waiting and len(running) < processes and not stop.asked:
                    task = waiting.pop(0)
                    process = context.Process(target=_work, args=(task, threads, sentences))
                    process.start()
                    running.append((task, process))
                    print(f"{task.name}: begun", flush=True)
                connection.wait([process.sentinel for _, process in running], timeout=0.5)
                if stop.asked:
                    _terminate(running)
                running = [pair for pair in running if not _ended(*pair, stop.asked, sentences)]
        finally:
            _terminate(running)
            for _, process in running:
                process.join()
    return not stop.asked


def _work(task: Task, threads: int, sentences: SimpleQueue[str]) -> None:
    """What a process does: the task; its exit status says how that went."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent decides
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            done = task.work()
        except InputError as error:
            sentences.put(str(error))
            sys.exit(2)
    sys.exit(0 if done else STOPPED)


def _end_with_parent() -> None:
    """End this process when its parent is gone: nothing else would write into its folders."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _ended(task: Task, process: SpawnProcess, stopping: bool, sentences: SimpleQueue[str]) -> bool:
    """Whether a process has ended; tells how.

    Raises:
        InputError: it failed.
    """
    status = process.exitcode
    if status is None:
        return False
    if status == 0:
        print(f"{task.name}: done", flush=True)
    elif not stopping:
        if not sentences.empty():
            raise InputError(sentences.get())
        ending = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise InputError(f"{task.name}: {ending}; the same command goes on from there")
    return True


def _terminate(running: Sequence[tuple[Task, SpawnProcess]]) -> None:
    for _, process in running:
        process.terminate()
