"""Tasks in child processes: done once each, and failing in one sentence."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.engine.loop import StopOnSignal
from mics_fast.study.processes import Task, run_tasks


def note(file: Path) -> bool:
    file.write_text(f"{os.getpid()} {torch.get_num_threads()}")
    return True


def stopped() -> bool:
    return False


def fail(file: Path) -> bool:
    raise InputError(f"{file} is wrong, wanted another")


def die(file: Path) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def ask_to_stop(file: Path) -> bool:
    """The parent gets SIGTERM; what it passes on, training takes for a reason to save."""
    with StopOnSignal() as stop:
        os.kill(os.getppid(), signal.SIGTERM)
        while not stop.asked:
            time.sleep(0.01)
        note(file)
    return False


def linger(file: Path) -> bool:
    time.sleep(60)
    return note(file)


@pytest.fixture
def task(tmp_path):
    def make(name, work):
        return Task(name, partial(work, tmp_path / name))

    return make


def test_every_task_is_done_in_a_process_of_its_own(task, tmp_path):
    assert run_tasks([task(name, note) for name in "abc"], 2)
    told = [(tmp_path / name).read_text().split() for name in "abc"]
    assert len({number for number, _ in told} | {str(os.getpid())}) == 4
    assert {threads for _, threads in told} == {str(max(1, torch.get_num_threads() // 2))}


def test_one_process_needs_no_other(task, tmp_path):
    assert run_tasks([task("a", note)], 1)
    assert (tmp_path / "a").read_text().split()[0] == str(os.getpid())
    assert not run_tasks([Task("stopped", stopped), task("b", note)], 1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("work", "sentence"),
    [(fail, "first is wrong, wanted another$"), (die, "^first: killed by signal 9; the same")],
)
def test_a_task_that_fails_ends_the_others_with_its_sentence(task, tmp_path, work, sentence):
    began = time.monotonic()
    with pytest.raises(InputError, match=sentence):
        run_tasks([task("first", work), task("second", linger), task("third", note)], 2)
    assert time.monotonic() - began < 50
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_sigterm_reaches_every_task_and_nothing_new_begins(task, tmp_path):
    began = time.monotonic()
    tasks = [task("first", ask_to_stop), task("second", linger), task("third", note)]
    assert not run_tasks(tasks, 2)
    assert time.monotonic() - began < 50 and (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()
