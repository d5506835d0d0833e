"""``python -m mics_fast.report``."""

from __future__ import annotations

from mics_fast.errors import run_command
from mics_fast.report import main

if __name__ == "__main__":
    run_command(main)
