"""Errors that end a command in one sentence, with their exit status."""

from __future__ import annotations

import argparse
import errno
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn, TextIO

LONGEST = 1000  # characters of a message
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only a write has, and that the user can mend."""


class InputError(Exception):
    """Bad input. The message is one sentence: what was given, what is wanted, where."""


class NoUsableImage(InputError):
    """None of the given rows has an image that can be used."""


class RunFailed(Exception):
    """A run that cannot go on although its input is valid. The message is one sentence."""


class SentenceParser(argparse.ArgumentParser):
    """An argument parser that reports errors in one sentence and accepts no abbreviations."""

    def __init__(self, *, description: str | None, **settings: Any) -> None:
        # The description follows the command's name in the first line of the module's docstring.
        text = (description or "").partition("``: ")[2].replace("``", "")
        super().__init__(
            description=text[:1].upper() + text[1:],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            unknown = next((own for own in rest if own.startswith("-")), rest[0]).split("=")[0]
            kind = "option" if unknown.startswith("-") else "argument"
            hint = did_you_mean(unknown, self._option_string_actions)
            raise InputError(f"{kind} {unknown} is unknown{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for an unknown name, or "" if no known name is close."""
    last = {other: other.lstrip("-").rpartition(".")[2] for other in known}
    own = name.lstrip("-").rpartition(".")[2]
    near = [other for other, end in last.items() if end == own]
    near = near or get_close_matches(name, last, 3, 0.75)
    near = near or [other for other, end in last.items() if get_close_matches(own, [end], 1, 0.75)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


class OutlivingStream:
    """A standard stream that survives its reader: once the pipe is closed, output is discarded.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def in_a_line(text: str) -> str:
    """Return a message on one line of bounded length, with control characters shown as "?"."""
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def warn(text: str) -> None:
    """Say something on stderr, on one line of a file or pipe.

    Names in it are data, which no terminal obeys.
    """
    print(wrapped(in_a_line(text), sys.stderr), file=sys.stderr)


def wrapped(line: str, stream: TextIO) -> str:
    """Break a line between words where a terminal would break it anywhere; else leave it whole."""
    if not stream.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def run_command(main: Callable[[], None]) -> None:
    """Run the ``main`` of a command, ending with a sentence instead of a traceback.

    Output problems do not fail the command: characters that the terminal lacks are escaped, and
    output to a closed pipe (``| head``) is discarded.

    Exit status: 2 for an ``InputError``, 1 for a ``RunFailed`` and, by Python's default, for any
    other error, 130 for Ctrl-C.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        # By default OpenMP's threads spin while they wait for each other: beside another busy
        # process every parallel loop then lasts as long as the scheduler's slice. torch reads the
        # variable on import, so it is set before any command imports torch.
        os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["PYTHONSAFEPATH"] = "1"  # for child processes: see mics_fast/__init__.py
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, OutlivingStream(stream))
    try:
        main()
    except (InputError, RunFailed) as error:
        warn(f"error: {error}")
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    except OSError as error:
        if error.errno not in FULL or not error.filename:
            raise
        warn(f"error: {in_a_line(str(error.filename))} cannot be written: {error.strerror}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sys.stdout.flush()
