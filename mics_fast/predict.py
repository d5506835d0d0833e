"""``python -m mics_fast.predict``: what a trained model says of images it is given.

For every sample: the class, the belief in each class, how uncertain that is, what each modality
says alone, and how much the modalities contradict each other. One modality alone is enough.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mics_fast.common.errors import InputError, SentenceParser, run_command
from mics_fast.inference.prediction import (
    REFER,
    ROWS_SHOWN,
    find_rows,
    json_lines,
    json_list,
    open_model,
    predict,
    print_answers,
    table_file,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Open the model, find the images, write and show what the model says of them."""
    options, images = parse(arguments)
    model = open_model(options.model)
    rows = find_rows(options, images, model.modalities)
    shown: list[dict[str, Any]] = []
    answers: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writer(file, *context))
            for file, writer, context in (
                (options.json, json_list, ()),
                (options.jsonl, json_lines, ()),
                (options.csv, table_file, (model, options.refer_above is not None)),
            )
            if file is not None
        ]
        for record in predict(model, rows, options.refer_above):
            for write in writers:
                write(record)
            answers[record["class"]] += 1
            if len(shown) < ROWS_SHOWN:
                shown.append(record)
    print_answers(shown, answers, model.modalities)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Path]]:
    """The command line, and the images it names: modality -> file.

    Raises:
        InputError: an option is unknown or out of range, or there is not one source of images.
    """
    parser = SentenceParser(
        prog="python -m mics_fast.predict",
        description=__doc__,
        epilog="One sample: an option for each modality there is, as in --wli a.png --nbi b.png.",
    )
    parser.add_argument("model", type=Path, help="run folder, or folder of mics_fast.export")
    parser.add_argument("--manifest", type=Path, help="all rows of this manifest")
    parser.add_argument("--folder", type=Path,
                        help="holds a folder of images for each modality: wli/ or x_wli/, ...; "
                        "files of the same stem are one sample")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write a list of answers to this file")
    parser.add_argument("--jsonl", type=Path, help="write an answer a line to this file")
    parser.add_argument("--csv", type=Path, help="write a table to this file")
    parser.add_argument("--refer-above", type=float, metavar="U",
                        help=f'answer "{REFER}" where the uncertainty is above this')  # fmt: skip
    options, rest = parser.parse_known_args(arguments)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        raise InputError(f"{' '.join(rest)} is not understood, wanted --<modality> FILE")
    images = {name[2:]: Path(file) for name, file in zip(rest[::2], rest[1::2], strict=True)}
    sources = [x for x in (options.manifest, options.folder, images) if x]
    if len(sources) != 1:
        raise InputError(
            f"there are {len(sources) or 'no'} sources of images, wanted one: --manifest FILE, "
            "--folder DIR, or --<modality> FILE for one sample"
        )
    if options.refer_above is not None and not 0 <= options.refer_above <= 1:
        raise InputError(f"--refer-above is {options.refer_above}, wanted a number from 0 to 1")
    return options, images


if __name__ == "__main__":
    run_command(main)
