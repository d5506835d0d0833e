"""What a user did wrong, told in one sentence, and the exit status that goes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input: the message is one sentence with what was given, what is wanted, and where."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's ``main``: status 2 and the sentence alone for an ``InputError``."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
