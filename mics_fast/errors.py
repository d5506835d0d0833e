"""What a user did wrong, told in one sentence, and the exit status that goes with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(Exception):
    """Bad input: the message is one sentence with what was given, what is wanted, and where."""


class SentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's ``main``: status 2 and the sentence alone for an ``InputError``."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
