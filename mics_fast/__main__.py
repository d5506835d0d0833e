"""``mics-fast COMMAND``: the console script, equivalent to ``python -m mics_fast.COMMAND``."""

from __future__ import annotations

import sys
from importlib import import_module

from mics_fast.common.errors import InputError, did_you_mean, run_command

COMMANDS = {
    "prepare": "images in folders or a table -> manifest.csv, checked and split",
    "train": "manifest -> run folder: pre-training and fine-tuning",
    "evaluate": "run -> metrics with intervals, per modality and fused",
    "predict": "run and images -> class, belief, uncertainty",
    "report": "run -> one HTML page",
    "export": "run -> ONNX and torch.export files, with a model card",
    "experiment": "manifest -> variants x labels x seeds, or cross-validation, in one table",
}


def main() -> None:
    """Run the command named by the first argument, or list the commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("mics-fast COMMAND --help\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:11} {purpose}")
        return
    if name not in COMMANDS:
        raise InputError(f"command {name} is unknown{did_you_mean(name, COMMANDS)}")
    import_module(f"mics_fast.{name}").main(sys.argv[2:])


def run() -> None:
    """Entry point of the console script."""
    run_command(main)


if __name__ == "__main__":
    run()
