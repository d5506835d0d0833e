"""``python -m mics_fast.train``: run both stages of MICS from a manifest into a run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mics_fast.common.errors import InputError, run_command, warn
from mics_fast.options.commands import parse_train, require

if TYPE_CHECKING:
    from mics_fast.training.trainer import Training


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the requested stages, and print the results."""
    config, resume, verbose = parse_train(arguments, __doc__)
    require(config)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.engine.distributed import joined, rank
    from mics_fast.training.build import pick_device
    from mics_fast.training.trainer import train

    with joined(pick_device(config.device), config.timeout_minutes):
        training, first = train(config, resume=resume, verbose=verbose), rank() == 0
    if first:
        close(training, config.out)


def close(training: Training, folder: str) -> None:
    """Print what the run is worth and what to do next, and a line for machines."""
    from mics_fast.inference.closing import print_closing

    run, finished = training
    if not finished:
        print(f"stopped and saved: resume with --resume --out {folder}")
    elif run.checkpoints("finetune").latest() is None:
        print(f"finished: {folder}")
        print(f"next: mics-fast train --stage finetune --resume --out {folder}")
    else:
        print(f"finished: {folder}")
        try:
            print_closing(Path(folder))
        except InputError as error:  # the run itself is whole
            warn(f"warning: not evaluated: {error}")
    sys.stdout.flush()
    if not sys.stdout.isatty():
        print(f"RESULT {json.dumps({'finished': finished, **run.result()})}", flush=True)


if __name__ == "__main__":
    run_command(main)
