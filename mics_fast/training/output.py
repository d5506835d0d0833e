"""Sentences of a run on the terminal."""

from __future__ import annotations

import sys

from mics_fast.common.errors import wrapped
from mics_fast.engine.distributed import rank


def say(sentence: str) -> None:
    """Print a sentence on rank 0 only."""
    if rank() == 0:
        print(wrapped(sentence, sys.stdout), flush=True)
