"""Tasks in child processes, a few at a time; the children end with their parent."""

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

STOPPED = 3  # exit status of a task that was stopped by SIGTERM


@dataclass(frozen=True)
class Task:
    """Work that leaves its result on disk.

    Args:
        name: for messages.
        work: picklable; returns True when done, False if stopped by SIGTERM.
    """

    name: str
    work: Callable[[], bool]


def run_tasks(tasks: Sequence[Task], processes: int) -> bool:
    """Run all tasks, starting them in order.

    Args:
        tasks: independent of each other.
        processes: 1: run them in this process, one after the other; otherwise this many at once,
            each in a new process with its share of torch's threads and without output.

    Returns:
        True when all are done, False if stopped by SIGTERM.

    Raises:
        InputError: the message of the first task that failed; the others are stopped.
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
    """Run the task in a child process, and report the outcome by the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            done = task.work()
        except InputError as error:
            sentences.put(str(error))
            sys.exit(2)
    sys.exit(0 if done else STOPPED)


def _end_with_parent() -> None:
    """End this process when its parent is gone; only then may others write into its folders."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _ended(task: Task, process: SpawnProcess, stopping: bool, sentences: SimpleQueue[str]) -> bool:
    """Return True if a process has ended successfully.

    Raises:
        InputError: the process failed.
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
        raise InputError(f"{task.name}: {ending}; the same command resumes from there")
    return True


def _terminate(running: Sequence[tuple[Task, SpawnProcess]]) -> None:
    for _, process in running:
        process.terminate()
