"""Mutations for the fuzz tests, which run for ``MICS_FUZZ_SECONDS`` each (default: 3)."""

from __future__ import annotations

import os
import random
import time

SECONDS = float(os.environ.get("MICS_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("MICS_FUZZ_SEED", "0"))


def draws():
    """Yield random generators with consecutive seeds until the time is over."""
    end, number = time.monotonic() + SECONDS, SEED
    while time.monotonic() < end:
        yield random.Random(number)
        number += 1
    print(f"{number - SEED} mutations in {SECONDS:g} s")  # shown by `make fuzz`


def mutated(draw, data, pieces=()):
    """Change some bytes: flip, cut, double, overwrite, truncate, or insert a piece."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.choice([1, 2, 8, 50, 200])]
        elif kind == 2:
            data[at:at] = data[at : at + draw.choice([1, 4, 30, 300])]
        elif kind == 3:
            end = at + draw.choice([1, 2, 4])
            data[at:end] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * (end - at)
        elif kind == 4 and pieces:
            data[at:at] = draw.choice(pieces)
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)
