"""``python -m mics_fast.train``: run both stages of MICS from a manifest into a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from mics_fast.common.errors import run_command
from mics_fast.options.commands import parse_train, require


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the requested stages."""
    config, resume = parse_train(arguments, __doc__)
    require(config)
    # torch takes seconds to import; --help and bad options are answered before that.
    from mics_fast.engine.distributed import joined
    from mics_fast.training.build import pick_device
    from mics_fast.training.trainer import train

    with joined(pick_device(config.device), config.timeout_minutes):
        train(config, resume=resume)


if __name__ == "__main__":
    run_command(main)
